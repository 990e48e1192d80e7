"""`ysnake completion bash`: a script with which a shell completes commands, options and files.

tyro makes the script from the options of all commands.
"""

import importlib
import io
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional

from ysnake.shared import cli


@dataclass
class Options:
    """Print a script that lets your shell complete the commands and options of ysnake. The page
    docs/shell.md says how to install it."""

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """bash, zsh or fish."""


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Print the script of a shell; returns the exit code."""
    from ysnake.__main__ import COMMANDS

    options = cli.parse(Options, argv, cli.command_line("completion", program))
    commands: list[Any] = [
        Annotated[options_of(name), tyro.conf.subcommand(name, description=what)]
        for name, what in COMMANDS.items()
    ]
    every: Any = Union[tuple(commands)]  # noqa: UP007  (it is made at run time)
    script = io.StringIO()
    with suppress(SystemExit), redirect_stdout(script):  # tyro prints it, then ends the process
        tyro.cli(
            every,
            prog="ysnake",
            args=["--tyro-print-completion", options.shell],
            config=(*cli.STYLE, tyro.conf.OmitSubcommandPrefixes),
            registry=cli.KINDS,
        )
    print(script.getvalue())
    if options.shell == "bash":  # where tyro knows no completion, complete the names of files
        print("complete -o default -F _tyro_ysnake ysnake")
    return cli.DONE


def options_of(command: str) -> type:
    """The dataclass with the options of a command."""
    module = "training.options" if command == "train" else command.replace("-", "_")
    found = importlib.import_module(f"ysnake.{module}")
    return found.Settings if command == "train" else found.Options


if __name__ == "__main__":
    cli.run(main)
