"""`python -m ysnake.generate_data`: let a language model in Ollama write a corpus.

It is asked about English words, encyclopedia topics and days of the year, by prompts of our own.
Each document is written the moment it is finished, whole or not at all, and a ledger beside the
file remembers what was asked, so that a process stopped or killed is taken up where it was.
"""

import asyncio
import sys

from ysnake.data_generation import ollama_client
from ysnake.data_generation.ledger import KEPT
from ysnake.data_generation.ollama_client import ServerError
from ysnake.data_generation.options import Options, check
from ysnake.data_generation.shelf import open_shelves
from ysnake.data_generation.writer import fill, report
from ysnake.shared import cli


def main(argv: list[str]) -> int:
    """Write a corpus as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, "generate_data")
    check(options)
    console = cli.console()
    shelves, code = [], cli.DONE
    try:
        ollama_client.prepare(options.model, options.pull, console)
        shelves = open_shelves(options)
        asyncio.run(fill(shelves, options, console))
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = cli.FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        code = cli.INTERRUPTED
    finally:
        for shelf in shelves:
            shelf.close()
    if shelves:
        report(shelves, console)
        if code != cli.DONE:
            console.print("The same command goes on from here.")
        elif any(shelf.wants for shelf in shelves):
            console.print("Everything was asked from every angle; there is no more to ask.")
        if any(shelf.counts[KEPT] for shelf in shelves):
            console.print(f"next: {cli.command_line('train')} --data {options.out}", markup=False)
    return code


if __name__ == "__main__":
    cli.run(main)
