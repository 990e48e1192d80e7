"""`ysnake`, or `python -m ysnake`: runs the command that its first argument names."""

import importlib

from ysnake import __version__
from ysnake.shared import cli
from ysnake.shared.errors import InputError

COMMANDS = {
    "train": "train a model on documents, or continue a run",
    "run": "complete a text",
    "chat": "talk with a model, which remembers the conversation",
    "serve": "serve a model: a page, and the APIs of Ollama and OpenAI",
    "evaluate": "measure how well a model predicts text",
    "export": "write a model as a GGUF file, for Ollama",
    "generate-data": "have llama 3.1 in Ollama write a corpus",
    "runs": "list the runs in runs/, or compare two",
    "watch": "show all runs on a local page, while they train",
    "doctor": "report what this machine has, and what ysnake uses of it",
    "completion": "print a script for completion in bash, zsh or fish",
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ysnake COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "`ysnake COMMAND --help` lists the options of a command.",
        ]
    )


def advice() -> str:
    """What to do next in this folder."""
    if not cli.runs():
        return "No run here yet. To train a small model within minutes: ysnake train"
    name = cli.newest_run()
    return f"The newest run is {name}. To write with it: ysnake chat"


def main(argv: list[str]) -> int:
    """Run the command that is named first; returns its exit code."""
    if not argv:
        print(f"{usage()}\n\n{advice()}")
        return cli.DONE
    name, *rest = argv
    name = name.replace("_", "-") if not name.startswith("-") else name
    if name in ("--help", "-h", "help"):
        print(usage())
        return cli.DONE
    if name == "--version":
        print(f"ysnake {__version__}")
        return cli.DONE
    if name not in COMMANDS:
        raise InputError(f"{name}: expected one of {', '.join(COMMANDS)}")
    module = importlib.import_module(f"ysnake.{name.replace('-', '_')}")
    return module.main(rest, cli.PROGRAM)


def console_script() -> None:
    """What the installed program `ysnake` calls."""
    cli.run(main)


if __name__ == "__main__":
    console_script()
