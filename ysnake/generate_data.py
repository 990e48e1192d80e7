"""`python -m ysnake.generate_data`: let a language model in Ollama write a corpus.

It is asked about English words, encyclopedia topics and days of the year. Each document is written
as soon as it is complete. A ledger beside the file records the questions, so that the same command
continues after it was stopped or killed. The work is in `ysnake.data_generation`.
"""

import asyncio
import sys

from ysnake.data_generation import ollama_client
from ysnake.data_generation.document_store import open_stores
from ysnake.data_generation.ledger import KEPT
from ysnake.data_generation.ollama_client import ServerError
from ysnake.data_generation.options import Options, check
from ysnake.data_generation.writer import report, write_corpus
from ysnake.shared import cli
from ysnake.shared.shown import as_argument


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Write a corpus as the command line says; returns the exit code."""
    options = cli.parse(Options, argv, cli.command_line("generate_data", program))
    check(options)
    console = cli.console()
    stores, code = [], cli.DONE
    try:
        ollama_client.prepare(options.model, options.pull, console)
        stores = open_stores(options)
        asyncio.run(write_corpus(stores, options, console))
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = cli.FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        code = cli.INTERRUPTED
    finally:
        for store in stores:
            store.close()
    if stores:
        report(stores, console)
        if code != cli.DONE:
            console.print("The same command continues from here.")
        elif any(store.needs_more for store in stores):
            console.print("All questions have been asked; there are no more.")
        if any(store.counts[KEPT] for store in stores):
            train = f"{cli.command_line('train', program)} --data {as_argument(options.out)}"
            console.print(f"next: {train}", markup=False)
    return code


if __name__ == "__main__":
    cli.run(main)
