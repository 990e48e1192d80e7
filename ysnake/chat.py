"""`python -m ysnake.chat`: write with a model line by line; it remembers all that was said."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.inference.sampling import Sampling
from ysnake.shared import cli
from ysnake.shared.errors import InputError


@dataclass
class Options:
    """Write with a model line by line. What it remembers is a state of constant size, so a
    conversation may be of any length. Type /help in it for its commands."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which checkpoint of a run; by default best where patience ended it, else last."""
    max_tokens: int = 200
    """Tokens of a reply at most."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT...")] = ()
    """End a reply where one of these texts appears; it is not printed."""
    weights: Literal["float32", "int8"] = "float32"
    """int8 writes faster on a CPU, and nearly the same."""
    compile: bool = False
    """Write faster on a CPU, for some seconds at the start: torch.compile, with a C++ compiler."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""


def main(argv: list[str]) -> int:
    """Talk as the command line says, until the input ends; returns the exit code."""
    options = cli.parse(Options, argv, "chat")
    if options.max_tokens < 1:
        raise InputError(f"--max-tokens: expected at least 1, got {options.max_tokens}")
    if "" in options.stop:
        raise InputError("--stop: expected texts of at least one character")
    path = options.path or cli.newest_run()

    from ysnake.checkpoints import checkpoint
    from ysnake.inference.chat import Chat
    from ysnake.inference.decoding import Decoder

    cli.tune_memory()
    cli.use_threads(options.threads)
    device = cli.pick_device(options.device)
    _, tokenizer, model = checkpoint.load_all(path, options.checkpoint, device)
    decoder = Decoder(model, options.weights, options.compile)
    Chat(decoder, tokenizer, options.sampling, options.max_tokens, options.stop).talk()
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
