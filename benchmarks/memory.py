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
from pathlib import Path

from ysnake.model.config import PRESETS, model_config
from ysnake.training import memory
from ysnake.training.options import Settings

OPTIMIZER = "adamw"  # it keeps more than Muon does
# preset, vocabulary, sequence, batch, chunk, --recompute, GB that the original project reports
ROWS = [
    ("ys-24m", 13_183, 256, 64, 64, False, 19.0),
    ("ys-24m", 13_183, 512, 16, 64, False, 21.5),
    ("ys-60m", 13_183, 128, 64, 64, False, 21.5),
    ("ys-71m", 28_590, 128, 64, 16, False, 21.9),
    ("ys-71m", 28_590, 128, 64, 64, False, None),
    ("ys-71m", 28_590, 128, 64, 64, True, None),
    ("ys-71m", 28_590, 128, 8, 64, False, None),
    ("quick", 4_096, 128, 8, 64, False, None),
]


def corpus(folder: Path, vocabulary: int) -> Path:
    """Write documents with more distinct words than the vocabulary has entries."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(vocabulary)]
    documents = [" ".join(words)] * 3 + [" ".join(rng.choices(words, k=200)) for _ in range(60)]
    path = folder / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


def measured(row: tuple, folder: Path) -> float:
    """Peak resident bytes of two training steps of a row, in a process of its own."""
    preset, vocabulary, seq_len, batch_size, chunk_size, recompute, _ = row
    options = {
        **{"preset": preset, "vocab-size": vocabulary, "tokenizer": "word"},
        **{"seq-len": seq_len, "batch-size": batch_size, "chunk-size": chunk_size},
        **{"max-steps": 2, "eval-every": 1000, "data": corpus(folder, vocabulary)},
        **{"run": folder / "run", "max-documents": 10_000, "optimizer": OPTIMIZER},
    }
    command = [sys.executable, "-m", "ysnake.train", *(["--recompute"] if recompute else [])]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def predicted(row: tuple) -> memory.Plan:
    preset, vocabulary, seq_len, batch_size, chunk_size, recompute, _ = row
    settings = Settings(**PRESETS[preset].settings)
    settings.chunk_size, settings.recompute, settings.optimizer = chunk_size, recompute, OPTIMIZER
    settings.seq_len, settings.batch_size = seq_len, batch_size
    config = model_config(settings, vocabulary, 0)
    return memory.predict(config, settings)


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
        preset, _, seq_len, batch_size, chunk_size, recompute, original = row
        name = preset + (" --recompute" if recompute else "")
        columns = (name, f"{plan.parameters:,}", seq_len, batch_size, chunk_size)
        sizes = (f"{plan.peak / 1e9:.2f} GB", f"{peak / 1e9:.2f} GB")
        theirs = f"{original} GB" if original else ""
        print("|", " | ".join(map(str, (*columns, *sizes, theirs))), "|", flush=True)
        results.append(
            {
                **{"preset": preset, "parameters": plan.parameters, "seq_len": seq_len},
                **{"batch_size": batch_size, "chunk_size": chunk_size, "recompute": recompute},
                **{"predicted": plan.peak, "measured": peak, "original_gb": original},
            }
        )
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
