"""What the tests of the model layer share: a tiny model, a small corpus, and the command line."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ysnake.checkpoints import checkpoint
from ysnake.model import Model
from ysnake.model.config import ModelConfig, padded_vocab
from ysnake.shared import cli
from ysnake.text import tokenizer

ROOT = Path(__file__).parents[2]
# the tiny model and its training, as command-line options
TINY = [
    *("--d-model", "32", "--n-layers", "2", "--d-state", "8", "--head-dim", "8"),
    *("--seq-len", "24", "--batch-size", "4"),
    *("--optimizer", "adamw", "--lr", "0.003", "--schedule", "cosine"),
]


def corpus(folder: Path, documents: int = 30) -> Path:
    """Write a corpus of short, different documents into the folder; returns its file."""
    animals = ("adder", "boa", "cobra", "krait", "mamba", "python", "viper")
    text = [
        f"The {animals[i % 7]} number {i} sleeps {i * 7 % 23} hours under stone {i * i % 91}. "
        f"It wakes when {animals[i * 3 % 7]} {i + 1} comes by and counts to {i * 13 % 57}."
        for i in range(documents)
    ]
    path = folder / "snakes.txt"
    path.write_text("\n<|endoftext|>\n".join(text) + "\n")
    return path


def model(seed: int = 0, vocab: int = 300, **sizes) -> Model:
    """A tiny model; sizes override."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_layers": 2, "d_state": 8, "head_dim": 8} | sizes
    return Model(ModelConfig(vocab_size=padded_vocab(vocab), **sizes))


def saved(folder: Path, **sizes) -> Path:
    """A checkpoint folder with a tiny model and a tokenizer that fits it."""
    text = corpus(folder).read_text()
    learnt = tokenizer.train("bpe", [text], 300)
    checkpoint.save(folder / "model", model(vocab=learnt.get_vocab_size(), **sizes), learnt)
    return folder / "model"


def python(*arguments: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Run `python -m ...` in `cwd` and wait; output is text."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        **{
            "cwd": cwd,
            "capture_output": True,
            "text": True,
            "timeout": 120,
            "env": environment(),
            "stdin": subprocess.DEVNULL,
        }
        | ({"stdin": None} if "input" in options else {})
        | options,
    )


def environment() -> dict[str, str]:
    """The environment in which a command finds the packages, whether installed or not."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def entry(command: Callable[[list[str]], int], *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, run in this process as `python -m` runs it."""
    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [command.__module__, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.run(command)
    except SystemExit as ended:
        return ended.code, out.getvalue(), errors.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("cli.run always ends the process")
