"""What the files in a run's folder say about the run, without loading its model."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ysnake.shared import run_lock
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json

SETTINGS, METRICS, SAMPLES = "settings.json", "metrics.jsonl", "samples.txt"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")  # endings of a checkpoint's weights
RECENT = 50  # steps over which the training loss is averaged
STATES = {  # why the run ended -> what a user reads
    "steps": "all steps done",
    "time": "out of time",
    "loss": "target loss reached",
    "patience": "stopped improving",
    "interrupted": "interrupted",
    "diverged": "diverged",
}


def is_model(folder: Path) -> bool:
    """Whether the folder is a run or a checkpoint, by the files in it."""
    if not os.path.isdir(folder):  # False also for what can be no name of a folder
        return False
    if (folder / SETTINGS).is_file() and (
        (folder / METRICS).exists() or (folder / "last").exists()
    ):
        return True
    weights = any(next(folder.glob(f"*{ending}"), None) for ending in WEIGHTS)
    return weights and (folder / "config.json").is_file()


def check_no_model(words: Iterable[Path | str], field: str) -> None:
    """Raise InputError if a value of the option `field` is a run or a checkpoint.

    An option that takes several values also takes the path that follows them.
    """
    for word in words:
        if is_model(Path(word)):
            raise InputError(
                f"{word} is a run or a checkpoint, no value of {field}; name it before the options",
                field=field,
            )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one for each step. Incomplete lines are left out."""
    path = folder / METRICS
    return parse_metrics(path.read_bytes()) if path.exists() else []


def parse_metrics(text: bytes) -> list[dict[str, Any]]:
    """The complete lines of a part of metrics.jsonl. Lines that are not metrics are left out."""
    found = []
    for line in text.splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:  # a process was killed while it wrote this line
            continue
        if isinstance(metrics, dict) and "step" in metrics:
            found.append(metrics)
    return found


def changed(folder: Path) -> float:
    """When the run was last started, resumed or trained, in seconds since 1970."""
    written = (folder / SETTINGS, folder / METRICS)
    return max((path.stat().st_mtime for path in written if path.exists()), default=0.0)


def state(folder: Path) -> str:
    """Either "in training", one of STATES, "can be resumed" after a kill, or "no checkpoint"."""
    if run_lock.held(folder / run_lock.TRAINING):
        return "in training"
    path = folder / "last" / "progress.json"
    if not path.exists():
        return "no checkpoint"
    progress = _object(path)
    ended = progress.get("ended")
    if not ended or _has_a_new_limit(_object(folder / SETTINGS), progress):
        return "can be resumed"
    return STATES.get(str(ended), str(ended))


def _has_a_new_limit(settings: dict[str, Any], progress: dict[str, Any]) -> bool:
    """Whether a run that had reached a limit was resumed with another, and killed before a save."""
    limits = {  # why it ended -> setting, field of progress.json, its units in one of the setting
        "steps": ("max_steps", "step", 1),
        "time": ("max_minutes", "elapsed", 60),
        "loss": ("stop_at_loss", "mean_loss", 1),
        "patience": ("patience", "evaluations_since_best", 1),
    }
    if str(progress["ended"]) not in limits:
        return False
    name, counted, unit = limits[progress["ended"]]
    limit, done = settings.get(name), progress.get(counted)
    if not isinstance(done, int | float) or not isinstance(limit, int | float | None):
        return False
    if limit is None:
        return True
    return done > limit if name == "stop_at_loss" else done < limit * unit  # a loss falls to it


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if it holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged (expected an object)")
    return found


def parameters(folder: Path) -> int | None:
    """The number of parameters in last/; None if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = folder / "last" / "model.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError):
        return None


SUMMARY = (
    *("run", "state", "parameters", "data", "steps", "loss"),
    *("best held-out loss", "best bits per byte", "tokens/s", "when"),
)


def summary(folder: Path) -> dict[str, Any]:
    """The run in a few values; None stands for what is not known.

    Raises:
        InputError: a file of the run is damaged.
    """
    lines = metrics(folder)
    losses = [line["train_loss"] for line in lines[-RECENT:] if line.get("train_loss") is not None]
    held_out = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    bits = [line["bits_per_byte"] for line in lines if line.get("bits_per_byte") is not None]
    speeds = sorted(line["tokens_per_s"] for line in lines if line.get("tokens_per_s"))
    data = _object(folder / SETTINGS).get("data") or []
    return {
        "run": str(folder),
        "state": state(folder),
        "parameters": parameters(folder),
        "data": " ".join(Path(path).name for path in data),
        "steps": lines[-1]["step"] if lines else 0,
        "loss": sum(losses) / len(losses) if losses else None,
        "best held-out loss": min(held_out, default=None),
        "best bits per byte": min(bits, default=None),
        "tokens/s": speeds[len(speeds) // 2] if speeds else None,
        "when": changed(folder),
    }
