"""`python -m ysnake.chat`: a conversation with a model, which remembers all of it."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from ysnake.inference.model_options import ModelOptions
from ysnake.inference.sampling import Sampling
from ysnake.shared import cli, run_files
from ysnake.shared.errors import InputError


@dataclass
class Options:
    """Talk with a model, line by line. The model remembers the whole conversation in a state of
    constant size, so a conversation may have any length. Type /help to list its commands."""

    model: ModelOptions = field(default_factory=ModelOptions)
    max_tokens: int = 200
    """Largest number of tokens in a reply."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Annotated[tuple[str, ...], arg(metavar="TEXT...")] = ()
    """End a reply where one of these texts appears; it is not printed."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Talk as the command line says, until the input ends; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("chat", program))
    if options.max_tokens < 1:
        raise InputError(f"expected at least 1, got {options.max_tokens}", field="--max-tokens")
    if "" in options.stop:
        raise InputError("expected texts of at least one character", field="--stop")
    run_files.check_no_model(options.stop, "--stop")
    decoder, tokenizer = options.model.load()

    from ysnake.inference.chat import Chat

    Chat(decoder, tokenizer, options.sampling, options.max_tokens, options.stop).talk()
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
