"""`python -m ysnake.run`: give text, get its completion, as it is written and at any length."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.inference.conversation import complete, converse, read
from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, terminal
from ysnake.shared.errors import InputError


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
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Read the prompt from this file, in UTF-8: a system limits the length of an argument."""
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


def main(argv: list[str]) -> int:
    """Complete as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, "run")
    if options.max_tokens < 1:
        raise InputError(f"--max-tokens: expected at least 1, got {options.max_tokens}")
    if "" in options.stop:
        raise InputError("--stop: expected texts of at least one character")
    if options.prompt is not None and options.prompt_file is not None:
        raise InputError("--prompt-file: expected no --prompt beside it")

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

    how = (options.sampling, options.max_tokens, options.stop)
    prompt = options.prompt and terminal.check_text(options.prompt, "--prompt")
    if options.prompt_file is not None:
        prompt = read_prompt(options.prompt_file)
    if prompt is None and sys.stdin and sys.stdin.isatty() and options.save_state is None:
        converse(new_context, tokenizer, *how)
        return cli.DONE
    if prompt is None:
        prompt = terminal.read_input().removesuffix("\n")  # which echo and editors add
    context = new_context()
    read(context, tokenizer, prompt)
    if options.save_state is not None:
        context.save(options.save_state)
        size = options.save_state.stat().st_size / 1e6
        print(f"{options.save_state}: {size:.1f} MB, whatever the length", file=sys.stderr)
    else:
        complete(context, tokenizer, *how)
    return cli.DONE


def read_prompt(path: Path) -> str:
    """The text of a file, without a line break at its end."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise terminal.not_text(str(path), error.start, "utf-8") from error
    except OSError as error:
        raise InputError(f"--prompt-file: {path}: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main)
