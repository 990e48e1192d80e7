"""`python -m ysnake.evaluate`: how well a model predicts text that it was not trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ysnake.inference.model_options import (
    CheckpointOption,
    DeviceOption,
    PathOption,
    ThreadsOption,
    Weights,
    make_decoder,
    read_model,
)
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.shared.progress import counted, progress
from ysnake.shared.shown import amount
from ysnake.shared.waiting import sleep_soon


@dataclass
class Options:
    """Measure the loss per token and the bits per byte of a model on documents."""

    path: PathOption = None
    checkpoint: CheckpointOption = None
    data: Annotated[tuple[Path, ...], arg(metavar="PATH...")] = ()
    """Files and folders of documents, as for training."""
    max_documents: int | None = None
    """Largest number of documents, from the files in turn."""
    encoding: str = "utf-8"
    """Encoding of the files, for example utf-16 or cp1252."""
    text_field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field of a .jsonl line that holds the document."""
    weights: Weights = "float32"
    """Format of the weights that are measured, as in `ysnake run`. float32 rounds nothing."""
    device: DeviceOption = "auto"
    threads: ThreadsOption = None


def main(argv: list[str], program: str = cli.MODULES) -> int:
    """Evaluate as the command line says; returns the exit code."""
    sleep_soon()
    options = cli.parse(Options, argv, cli.command_line("evaluate", program))
    from ysnake.text import data

    if not options.data:
        raise InputError("expected files or folders to evaluate on", field="--data")
    if options.max_documents is not None and options.max_documents < 1:
        raise InputError(
            f"expected at least 1, got {options.max_documents}", field="--max-documents"
        )
    corpus = data.open_corpus(options)

    from ysnake.inference.score import score

    folder, tokenizer, model = read_model(
        options.path, options.checkpoint, options.device, options.threads
    )
    model.config.document_tokens()  # raises before the weights are prepared
    decoder = make_decoder(model, options.weights, compile=options.weights != "float32")
    console = cli.console()
    with progress(console) as show:
        advance = counted(show, corpus.size, "evaluating")
        total = score(decoder, tokenizer, corpus.pieces(), advance)
    if total.tokens == 0:
        raise InputError("no text in these files", field="--data")
    for line in [*corpus.left_out.lines(), total.warning()]:
        if line:
            console.print(line, markup=False)
    console.print(
        f"{cli.markup(folder)}: {total.loss_per_token:.4f} nats per token, "
        f"{total.bits_per_byte:.4f} bits per byte "
        f"({amount(total.documents, 'document')}, {amount(total.tokens, 'token')}, "
        f"{amount(total.bytes, 'byte')})"
    )
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
