"""How training settings change what is learnt: `python -m benchmarks.recipes --text FILE`.

A recipe is a set of options of `ysnake.train`. Each recipe trains with each learning rate and each
seed, with the same batches in the same order. They are compared by the held-out loss per byte.
Finished runs are not repeated, and stopped runs continue. With --at-once several trainings share
the processor, each on its own cores.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.recipes_report import LN2, Trained, draw, markdown
from ysnake.doctor import processor
from ysnake.shared.errors import InputError

ROOT = Path(__file__).parents[1]
BATCH = {"seq_len": 256, "batch_size": 8}
SIZES: dict[str, dict[str, object]] = {
    "3M": {"d_model": 256, "n_layers": 4, "d_state": 64, "vocab_size": 4096},
    "24M": {"d_model": 512, "n_layers": 10, "vocab_size": 13_183},
    "71M": {"d_model": 768, "n_layers": 13, "vocab_size": 28_590},
}
# The report compares the others with "baseline".
RECIPES: dict[str, dict[str, object]] = {
    "baseline": {"optimizer": "adamw", "schedule": "cosine", "init": "hippo"},
    "linear": {"schedule": "linear"},
    "uniform": {"init": "uniform"},
    "linear-uniform": {"schedule": "linear", "init": "uniform"},
    "muon": {"optimizer": "muon"},
    "muon-linear-uniform": {"optimizer": "muon", "schedule": "linear", "init": "uniform"},
    "zero-out": {"zero_out": True},
    "muon-linear-zero": {"optimizer": "muon", "schedule": "linear", "zero_out": True},
    "no-decay": {"weight_decay": 0.0},
    "short-warmup": {"warmup_steps": 20},
    "carry-state": {"carry_state": True},
    "half-batch": {"batch_size": 4},
    "small-heads": {"head_dim": 32},
    "large-state": {"d_state": 128},
}


@dataclass
class Options:
    """Train each recipe with each learning rate and seed, and report the held-out losses."""

    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH...")]
    """Files and folders to train on, as for `ysnake.train --data`."""
    size: Literal["3M", "24M", "71M"] = "3M"
    """Size of the model: its number of parameters, about."""
    recipe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("baseline",)
    """Which recipes: any of those in benchmarks/recipes.py, or all."""
    lr: tuple[float, ...] = (3e-3, 6e-3, 12e-3)
    """Peak learning rates. The best should not be the first or the last."""
    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds: first weights and order of the batches."""
    steps: int | None = 300
    """Steps of a training."""
    minutes: float | None = None
    """Train for this many minutes, instead of a number of steps."""
    warmup_steps: int = 50
    """Steps until the learning rate reaches its peak."""
    at_once: int = 1
    """Trainings beside each other. Each takes its part of the cores. On two cores, two trainings
    with one thread each need less time than one after the other with two threads."""
    runs: Path = Path("runs/recipes")
    """Where the trainings are kept."""
    out: Path = ROOT / "benchmarks/results/recipes"
    """Where the table, the picture and the curves are written."""


def main(argv: list[str]) -> int:
    """Train what is missing, and write the report after each training."""
    options = tyro.cli(Options, prog="python -m benchmarks.recipes", args=argv)
    names = tuple(RECIPES) if options.recipe == ("all",) else options.recipe
    unknown = set(names) - set(RECIPES)
    if unknown:
        raise InputError(
            f"--recipe: expected some of {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}"
        )
    if options.at_once < 1:
        raise InputError(f"--at-once: expected at least 1, got {options.at_once}")
    console = Console()
    wanted = [Training(n, lr, seed) for seed, n, lr in product(options.seed, names, options.lr)]
    train_unless_ended(options, wanted[0])  # alone, since the others take its tokens
    pool = ThreadPoolExecutor(options.at_once)
    try:
        going = [pool.submit(train_unless_ended, options, each) for each in wanted]
        for done in track(as_completed(going), "training", total=len(going), console=console):
            done.result()
            report(options)
    finally:
        pool.shutdown(cancel_futures=True)
    return 0


class Training(NamedTuple):
    """What is trained: a recipe with a learning rate and a seed."""

    recipe: str
    lr: float
    seed: int


def train_unless_ended(options: Options, training: Training) -> None:
    """Train to the end what has not been trained to its end."""
    run = folder(options, *training)
    if not ended(run):
        recipe = RECIPES[training.recipe]
        train(options, run, recipe | {"lr": training.lr, "seed": training.seed})


def folder(options: Options, name: str, lr: float, seed: int) -> Path:
    """The folder of a training. Its path holds all options but the text."""
    long = f"{options.minutes:g}-minutes" if options.minutes else f"{options.steps}-steps"
    long += f"-warmup-{options.warmup_steps}"
    long += f"-{options.at_once}-at-once" if options.at_once > 1 else ""
    return options.runs / f"{options.size}-{long}" / name / f"lr-{lr:g}-seed-{seed}"


def ended(run: Path) -> bool:
    """Whether this training has reached its end."""
    path = run / "last/progress.json"
    return path.is_file() and json.loads(path.read_text())["ended"] in ("steps", "time")


def train(options: Options, run: Path, recipe: dict[str, object]) -> None:
    """Start or continue a training, in a process of its own."""
    command = [sys.executable, "-m", "ysnake.train", "--run", str(run)]
    if (run / "last").is_dir():
        check_text(options, run)
        command.append("--resume")
    else:
        steps = options.steps or 10**6
        values = SIZES[options.size] | BATCH | {"warmup_steps": options.warmup_steps}
        values |= {"eval_every": max(1, min(steps // 5, 250)), "checkpoint_every": 100} | recipe
        end = {"max_minutes": options.minutes} if options.minutes else {"max_steps": steps}
        command += ["--preset", "ys-24m", "--data", *map(str, options.text)]
        if others := finished(options):
            command += ["--tokens-from", str(others[0])]
        for name, value in (values | end).items():
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
    command += ["--threads", str(max(1, (os.cpu_count() or 1) // options.at_once))]
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}.log"
    with path.open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise InputError(f"{run}: the training failed, {path} says why")


def finished(options: Options) -> list[Path]:
    """The folders of the trainings with these sizes and this length that have come to their end."""
    here = folder(options, "", 0, 0).parent
    found = sorted(path for path in here.glob("*/lr-*-seed-*") if path.is_dir() and ended(path))
    for run in found:
        check_text(options, run)
    return found


def check_text(options: Options, run: Path) -> None:
    """Raise InputError if a training that is there has another text."""
    data = json.loads((run / "settings.json").read_text())["data"]
    if data != [str(path.resolve()) for path in options.text]:
        raise InputError(f"--text: {run} was trained on {', '.join(data)}; choose another --runs")


def trained(options: Options) -> Iterator[Trained]:
    """What was trained with these sizes and this length, also in earlier executions."""
    for path in finished(options):
        settings = json.loads((path / "settings.json").read_text())
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        curve = [
            (line["tokens"], line["seconds"], line["bits_per_byte"] * LN2)
            for line in lines
            if line.get("bits_per_byte") is not None
        ]
        yield Trained(path.parent.name, settings["lr"], settings["seed"], curve)


def report(options: Options) -> None:
    """Write the curves, the table and the picture of everything that is trained."""
    found = list(trained(options))
    options.out.mkdir(parents=True, exist_ok=True)
    name = folder(options, "", 0, 0).parent.name
    text = ", ".join(path.name for path in options.text)
    where = f"{platform.system()}, {processor()}"
    title = f"{name} on {text}, {BATCH['batch_size']} x {BATCH['seq_len']} tokens a step ({where})"
    curves = {"title": title, "runs": [vars(each) for each in found]}
    (options.out / f"{name}.json").write_text(json.dumps(curves) + "\n")
    (options.out / f"{name}.md").write_text(markdown(found, title))
    draw(found, title, options.out / f"{name}.png")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
