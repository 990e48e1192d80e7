"""`python -m ysnake.evaluate`: how well a model predicts a text it has not seen."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared import cli
from ysnake.shared.waiting import sleep_soon

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ysnake.inference.decoding import Decoder
    from ysnake.text.data import Piece

READ = 1024  # tokens at once
DROPPED = 8  # bits that a byte costs for which the tokenizer has no token, as any of 256 values


@dataclass
class Options:
    """Measure the loss per token and the bits per byte of a model on documents."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    data: Annotated[tuple[Path, ...], arg(metavar="PATH...")] = ()
    """Files and folders of documents, as for training."""
    max_documents: int | None = None
    """Take so many documents only, in turn from each file."""
    encoding: str = "utf-8"
    """Encoding of the files, for example utf-16 or cp1252."""
    text_field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field of a .jsonl line that holds the document."""
    weights: Literal["float32", "int8"] = "float32"
    """int8: measure what --weights int8 of ysnake.run writes with."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""


@dataclass
class Score:
    """Sums over all documents read."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    nats: float = 0.0
    dropped: int = 0  # of the bytes, those of characters that the tokenizer has no token for

    @property
    def loss_per_token(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return (self.nats / math.log(2) + DROPPED * self.dropped) / max(1, self.bytes)

    def warning(self) -> str | None:
        """What the tokenizer could not read, if anything."""
        if not self.dropped:
            return None
        return (
            f"warning: the tokenizer drops {self.dropped / self.bytes:.1%} of the text "
            f"({self.dropped:,} of {self.bytes:,} bytes), characters that it does not know; in "
            f"bits per byte each such byte counts as {DROPPED}"
        )


def score(
    decoder: "Decoder",
    tokenizer: "Tokenizer",
    pieces: Iterable["Piece"],
    progress: Callable[[int], None],
) -> Score:
    """Read each document from bos to eos with one state, so at any length in the same memory.

    Every token after the bos counts, the eos that ends a document too. `progress` is called with
    the number of characters just done.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from ysnake.text.tokenizer import dropped_bytes, encode

    model = decoder.model
    device = model.backbone.embeddings.weight.device
    total = Score()
    state, before = model.empty_state(1), model.config.bos_id  # read so far, and not yet read
    for text, ends in pieces:
        ids = encode(tokenizer, text)
        total.dropped += dropped_bytes(tokenizer, text, ids)
        ids += [model.config.eos_id] if ends else []
        for i in range(0, len(ids), READ):
            targets = torch.tensor(ids[i : i + READ], device=device)
            inputs = torch.cat([targets.new_tensor([before]), targets[:-1]])
            logits, state = decoder.step(inputs[None], state)
            total.nats += cross_entropy(logits[0], targets, reduction="sum").item()
            before = ids[i : i + READ][-1]
        total.tokens += len(ids)
        total.bytes += len(text.encode("utf-8", "replace"))
        if ends:
            total.documents += 1
            state, before = model.empty_state(1), model.config.bos_id
        progress(len(text))
    return total


def main(argv: list[str]) -> int:
    """Evaluate as the command line says; returns the exit code."""
    sleep_soon()
    options = cli.parse(Options, argv, "evaluate")
    from ysnake.shared.errors import InputError
    from ysnake.text import data

    if not options.data:
        raise InputError("--data: expected files or folders to evaluate on")
    if options.max_documents is not None and options.max_documents < 1:
        raise InputError(f"--max-documents: expected at least 1, got {options.max_documents}")
    corpus = data.open_corpus(options)

    from rich.progress import Progress

    from ysnake.checkpoints import checkpoint
    from ysnake.inference.decoding import Decoder

    cli.tune_memory()
    cli.use_threads(options.threads)
    path, device = options.path or cli.newest_run(), cli.pick_device(options.device)
    folder, tokenizer, model = checkpoint.load_all(path, device=device)
    model.config.check_frame()
    decoder = Decoder(model, options.weights)
    console = cli.console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=corpus.size)
        total = score(decoder, tokenizer, corpus.pieces(), lambda n: bar.advance(task, n))
    if total.tokens == 0:
        raise InputError("--data: no text in these files")
    for line in [*corpus.left_out.lines(), total.warning()]:
        if line:
            console.print(line, markup=False)
    console.print(
        f"{folder}: {total.loss_per_token:.4f} nats per token, "
        f"{total.bits_per_byte:.4f} bits per byte "
        f"({total.documents:,} documents, {total.tokens:,} tokens, {total.bytes:,} bytes)"
    )
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
