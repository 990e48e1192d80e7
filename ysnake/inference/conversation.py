"""Completing prompts in a terminal: one prompt, or a conversation line by line."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import texts, until
from ysnake.shared import terminal
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer

    from ysnake.inference.generate import Context


def read(context: "Context", tokenizer: "Tokenizer", prompt: str) -> None:
    """Feed a prompt; a context that is new starts a document first."""
    from ysnake.text.tokenizer import encode

    bos = context.model.config.bos_id
    ids = [bos] if context.logits is None and bos is not None else []
    ids += encode(tokenizer, prompt)
    if context.logits is None and not ids:
        raise InputError("--prompt: expected text, as this model has no token to begin with")
    context.feed(ids)


def complete(
    context: "Context",
    tokenizer: "Tokenizer",
    sampling: Sampling,
    max_tokens: int,
    stops: tuple[str, ...],
) -> None:
    """Print a completion as it is written; Ctrl-C ends the completion, not the program."""
    tokens = context.generate(sampling, max_tokens)
    try:
        for text in until(texts(tokenizer, tokens), stops):
            print(escape_controls(text, keep="\n\t"), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)


def converse(
    new_context: "Callable[[], Context]",
    tokenizer: "Tokenizer",
    sampling: Sampling,
    max_tokens: int,
    stops: tuple[str, ...],
) -> None:
    """Complete what is typed, line by line, until the end of input."""
    with suppress(ImportError):  # not on Windows, whose console does the same
        import readline  # noqa: F401  (gives input() its history and editing)

    print("Type the beginning of a text. An empty line goes on; Ctrl-D leaves.", file=sys.stderr)
    context = new_context()
    while True:
        try:
            prompt = terminal.ask("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if prompt:
            context = new_context()
            read(context, tokenizer, prompt)
        elif context.logits is None:
            continue
        complete(context, tokenizer, sampling, max_tokens, stops)
