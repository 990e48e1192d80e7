"""Completing prompts on the terminal: a single one, or a conversation line by line."""

import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, terminal
from ysnake.shared.errors import InputError
from ysnake.shared.progress import progress
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenizers import Tokenizer

    from ysnake.inference.generate import Context


SHOWN_FROM = 4096  # tokens of a prompt; a CPU may need minutes for a long one


def read(context: "Context", tokenizer: "Tokenizer", prompt: str) -> None:
    """Read a prompt, with progress on standard error if it is long.

    A new context first reads the token that begins a document.
    """
    from ysnake.text.tokenizer import encode

    bos = context.model.config.bos_id
    ids = [bos] if context.logits is None and bos is not None else []
    ids += encode(tokenizer, prompt)
    if context.logits is None and not ids:
        raise InputError(
            "expected text, as this model has no token that begins a document", field="--prompt"
        )
    if len(ids) < SHOWN_FROM:
        context.feed(ids)
    else:
        _feed_with_progress(context, ids)


def _feed_with_progress(context: "Context", ids: list[int]) -> None:
    from ysnake.inference.generate import PROMPT_STEP

    with progress(cli.console(sys.stderr)) as show:
        for start in range(0, len(ids), PROMPT_STEP):
            show(start / len(ids), f"reading the prompt: {start:,} of {len(ids):,} tokens")
            context.feed(ids[start : start + PROMPT_STEP])


def interruptible(tokens: "Iterator[int]") -> "Iterator[int]":
    """The same tokens. Ctrl-C raises KeyboardInterrupt between two of them, not inside the model.

    Inside the model, some layers would have read a token and others not.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as for a command that a shell runs in the background
        yield from tokens
        return
    signal.signal(signal.SIGINT, note)
    try:
        for token in tokens:
            yield token
            if pressed:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Completed(NamedTuple):
    """What a completion leaves."""

    context: "Context"  # has read what was printed: no stop text, and nothing behind it
    n_tokens: int  # generated
    stopped: bool  # by Ctrl-C


def complete(
    context: "Context",
    tokenizer: "Tokenizer",
    sampling: Sampling,
    max_tokens: int,
    stops: tuple[str, ...],
) -> Completed:
    """Print a completion while it is generated. Ctrl-C ends the completion, not the program."""
    from ysnake.inference.text_stream import TextStream, until
    from ysnake.text.tokenizer import encode

    before, generated, printed, stopped = context.copy(), "", "", False
    stream, ids = TextStream(context.last_token), list[int]()

    def noted() -> "Iterator[str]":
        nonlocal generated
        for token in interruptible(context.generate(sampling, max_tokens)):
            ids.append(token)
            text = stream.step(tokenizer, token)
            generated += text
            yield text

    try:
        for text in until(noted(), stops):
            printed += text
            print(escape_controls(text, keep="\n\t"), end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)
    if printed != generated:
        context = before
        context.feed(encode(tokenizer, printed))
    elif stream.held:  # a part of a character at the end
        context = before
        context.feed(ids[: len(ids) - len(stream.held)])
    return Completed(context, len(ids), stopped)


def converse(
    new_context: "Callable[[], Context]",
    tokenizer: "Tokenizer",
    sampling: Sampling,
    max_tokens: int,
    stops: tuple[str, ...],
) -> None:
    """Complete each line that the user types, until the end of input."""
    with suppress(ImportError):  # Windows has none; its console does the same
        import readline  # noqa: F401  (gives input() its history and editing)

    print(
        "Type the beginning of a text. An empty line continues the last text; Ctrl-D ends.",
        file=sys.stderr,
    )
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
        context = complete(context, tokenizer, sampling, max_tokens, stops).context
