"""`python -m ysnake.run`: give text, get its completion, as it is written and at any length."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, terminal
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.generate import Context

UNKNOWN = "\ufffd"  # what bytes that are not yet a character decode to


@dataclass
class Options:
    """Complete text with a trained model. Without a prompt: a conversation line by line."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which checkpoint of a run; by default best where patience ended it, else last."""
    prompt: str | None = None
    """Text to go on from. Left out: asked for line by line, or read from a pipe, whose last
    line break does not count."""
    max_tokens: int = 200
    """Tokens to write at most."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT...")] = ()
    """End where one of these texts appears; it is not printed."""
    save_state: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write what the model remembers after the prompt to this file, and complete nothing."""
    load_state: Annotated[Path | None, arg(metavar="FILE")] = None
    """Go on from what another prompt left in this file."""
    weights: Literal["float32", "int8"] = "float32"
    """int8 writes faster on a CPU, and nearly the same."""
    compile: bool = False
    """Write faster on a CPU, for some seconds at the start: torch.compile, with a C++ compiler."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""


def texts(tokenizer: "Tokenizer", ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; bytes wait until they make a character."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        if text := stream.step(tokenizer, token):
            yield text


def until(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to where one of `stops` appears; what may be the start of one waits."""
    waiting = ""
    for piece in pieces:
        text, waiting, found = cut(waiting + piece, stops)
        yield text
        if found:
            return
    yield waiting


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """What of a text may be shown, what waits as it may begin a stop text, and if one was found."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    keep = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - keep], text[len(text) - keep :], False


def read(context: "Context", tokenizer: "Tokenizer", prompt: str) -> None:
    """Feed a prompt; a context that is new starts a document first."""
    from ysnake.text.tokenizer import encode

    bos = context.model.config.bos_id
    ids = [bos] if context.logits is None and bos is not None else []
    ids += encode(tokenizer, prompt)
    if context.logits is None and not ids:
        raise InputError("--prompt: expected text, as this model has no token to begin with")
    context.feed(ids)


def complete(context: "Context", tokenizer: "Tokenizer", options: Options) -> None:
    """Print a completion as it is written; Ctrl-C ends the completion, not the program."""
    tokens = context.generate(options.sampling, options.max_tokens)
    try:
        for text in until(texts(tokenizer, tokens), options.stop):
            print(escape_controls(text, keep="\n\t"), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)


def converse(new_context, tokenizer: "Tokenizer", options: Options) -> None:
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
        complete(context, tokenizer, options)


def main(argv: list[str]) -> int:
    """Complete as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, "run")
    if options.max_tokens < 1:
        raise InputError(f"--max-tokens: expected at least 1, got {options.max_tokens}")
    if "" in options.stop:
        raise InputError("--stop: expected texts of at least one character")

    from ysnake.checkpoints import checkpoint

    path = options.path or cli.newest_run()
    from ysnake.inference.decoding import Decoder
    from ysnake.inference.generate import Context

    cli.tune_memory()
    cli.use_threads(options.threads)
    device = cli.pick_device(options.device)
    _, tokenizer, model = checkpoint.load_all(path, options.checkpoint, device)
    decoder = Decoder(model, options.weights, options.compile)

    def new_context() -> Context:
        context = Context(decoder, tokenizer.get_vocab_size())
        if options.load_state is not None:
            context.load(options.load_state)
        return context

    prompt = options.prompt and terminal.check_text(options.prompt, "--prompt")
    if prompt is None and sys.stdin and sys.stdin.isatty() and options.save_state is None:
        converse(new_context, tokenizer, options)
        return cli.DONE
    if prompt is None:
        prompt = terminal.read_input().removesuffix("\n")  # which echo and editors add
    context = new_context()
    read(context, tokenizer, prompt)
    if options.save_state is not None:
        context.save(options.save_state)
    else:
        complete(context, tokenizer, options)
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
