"""`python -m benchmarks.memory [--out FILE]`: the peak memory of real training runs, and what
`ysnake.train --plan` predicts for them. It takes some minutes and 6 GB.

The original project, YS-71M v0.1, reports memory for its own model on a GPU. The first rows have as
many parameters and the same sizes of batches.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from ysnake.model.config import PRESETS, model_config
from ysnake.training import memory
from ysnake.training.options import Optimizer, Precision, Settings

SPARE_WORDS = 1.2  # a part of the text is held out, and so are words that occur only there


class Row(NamedTuple):
    """A training run."""

    preset: str
    vocab_size: int
    seq_len: int
    batch_size: int
    chunk_size: int
    original_gb: float | None = None  # what the original project reports
    recompute: bool = False
    precision: Precision = "float32"
    optimizer: Optimizer = "adamw"  # it keeps more than Muon does

    @property
    def name(self) -> str:
        """The preset, and the options that differ from the defaults of a row."""
        given = [self.preset, *(["--recompute"] if self.recompute else [])]
        for name in ("precision", "optimizer"):
            value = getattr(self, name)
            if value != self._field_defaults[name]:
                given.append(f"--{name} {value}")
        return " ".join(given)


ROWS = [
    Row("ys-24m", 13_183, 256, 64, 64, 19.0),
    Row("ys-24m", 13_183, 512, 16, 64, 21.5),
    Row("ys-60m", 13_183, 128, 64, 64, 21.5),
    Row("ys-71m", 28_590, 128, 64, 16, 21.9),
    Row("ys-71m", 28_590, 128, 64, 64),
    Row("ys-71m", 28_590, 128, 64, 64, optimizer="muon"),
    Row("ys-71m", 28_590, 128, 64, 64, precision="bfloat16"),
    Row("ys-71m", 28_590, 128, 64, 64, precision="bfloat16", optimizer="muon"),
    Row("ys-71m", 28_590, 128, 64, 64, recompute=True),
    Row("ys-71m", 28_590, 128, 8, 64),
    Row("quick", 4_096, 128, 8, 64),
]


def corpus(folder: Path, vocabulary: int) -> Path:
    """Write documents with more distinct words than the vocabulary has entries."""
    rng = random.Random(0)
    count = int(SPARE_WORDS * vocabulary)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(count)]
    documents = [" ".join(words)] * 3 + [" ".join(rng.choices(words, k=200)) for _ in range(60)]
    path = folder / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def measured(row: Row, folder: Path) -> float:
    """Peak resident bytes of two training steps of a row, in a process of its own."""
    options = {
        **{"preset": row.preset, "vocab-size": row.vocab_size, "tokenizer": "word"},
        **{"seq-len": row.seq_len, "batch-size": row.batch_size, "chunk-size": row.chunk_size},
        **{"precision": row.precision, "optimizer": row.optimizer, "max-steps": 2},
        **{"eval-every": 1000, "data": corpus(folder, row.vocab_size), "run": folder / "run"},
        "max-documents": 10_000,
    }
    command = [sys.executable, "-m", "ysnake.train", *(["--recompute"] if row.recompute else [])]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def predicted(row: Row) -> memory.Plan:
    own = set(Row._fields) & {f.name for f in fields(Settings)}
    settings = Settings(**PRESETS[row.preset].settings)
    settings = replace(settings, **{name: getattr(row, name) for name in own})
    return memory.predict(model_config(settings, row.vocab_size, 0), settings)


def writable(text: str) -> Path:
    """The path of a file, checked for writing now, since the work takes minutes."""
    try:
        Path(text).parent.mkdir(parents=True, exist_ok=True)
        Path(text).open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return Path(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=writable, default=Path(__file__).parent / "results/memory.json"
    )
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)))
    arguments = parser.parse_args()
    results = []
    print("| preset | parameters | sequence | batch | chunk | predicted | measured | original |")
    print("|---|---|---|---|---|---|---|---|")
    for row in (ROWS[i] for i in arguments.rows):
        plan = predicted(row)
        with tempfile.TemporaryDirectory() as folder:
            peak = measured(row, Path(folder))
        columns = (row.name, f"{plan.parameters:,}", row.seq_len, row.batch_size, row.chunk_size)
        sizes = (f"{plan.peak / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB")
        theirs = f"{row.original_gb} GB" if row.original_gb else ""
        print("|", " | ".join(map(str, (*columns, *sizes, theirs))), "|", flush=True)
        counts = {"parameters": plan.parameters, "predicted": plan.peak, "measured": peak}
        results.append(row._asdict() | counts)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
