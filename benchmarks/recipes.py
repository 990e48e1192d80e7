"""How training settings change what is learnt: `python -m benchmarks.recipes --text FILE`.

A recipe is a set of options of `ysnake.train`. Each recipe trains with each learning rate and each
seed, with the same batches in the same order. They are compared by the held-out loss per byte.
Finished runs are not repeated, and stopped runs continue. With --at-once several trainings share
the machine: each has its own cores, and all use the same GPU if there is one.
"""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.progress import Progress

from benchmarks.recipes_report import LN2, Trained, draw, markdown
from ysnake.doctor import processor
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training import settings as settings_of
from ysnake.training.signals import Stop

ROOT = Path(__file__).parents[1]
POLLED = 0.2  # seconds between two checks for a stop signal
BATCH = {"seq_len": 256, "batch_size": 8}
SIZES: dict[str, dict[str, object]] = {
    "3M": {"d_model": 256, "n_layers": 4, "d_state": 64, "vocab_size": 4096},
    "24M": {"d_model": 512, "n_layers": 10, "vocab_size": 13_183},
    "71M": {"d_model": 768, "n_layers": 13, "vocab_size": 28_590},
}
MUON_95: dict[str, object] = {"optimizer": "muon", "momentum": 0.95}
MUON: dict[str, object] = {"optimizer": "muon", "momentum": 0.9, "beta2": 0.99}
SHORT: dict[str, object] = {"seq_len": 128, "batch_size": 16}
CHANGES: dict[str, dict[str, object]] = {
    "linear": {"schedule": "linear"},
    "uniform": {"init": "uniform"},
    "zero-out": {"zero_out": True},
    "no-decay": {"weight_decay": 0.0},
    "carry-state": {"carry_state": True},
    "small-heads": {"head_dim": 32},
    "large-state": {"d_state": 128},
}
# Each recipe changes "baseline", with which the report compares it.
RECIPES: dict[str, dict[str, object]] = {
    "baseline": {"optimizer": "adamw", "schedule": "cosine", "init": "hippo", "beta2": 0.95},
    **CHANGES,
    "linear-uniform": {"schedule": "linear", "init": "uniform"},
    "linear-zero": {"schedule": "linear", "zero_out": True},
    "short-warmup": {"warmup_steps": 20},
    "batch-4": {"batch_size": 4},
    "beta2-99": {"beta2": 0.99},
    "muon": MUON_95,
    "muon-linear": {**MUON_95, "schedule": "linear"},
    "muon-linear-uniform": {**MUON_95, "schedule": "linear", "init": "uniform"},
    "muon-linear-zero": {**MUON_95, "schedule": "linear", "zero_out": True},
    "muon-90": {"optimizer": "muon", "momentum": 0.9},
    "muon-90-linear": {"optimizer": "muon", "momentum": 0.9, "schedule": "linear"},
    "muon-90-batch-4": {"optimizer": "muon", "momentum": 0.9, "batch_size": 4},
    "muon-80": {"optimizer": "muon", "momentum": 0.8},
    "muon-beta2-99": MUON,
    "muon-beta2-999": {**MUON, "beta2": 0.999},
    "muon-beta2-99-seq-128": {**MUON, **SHORT},  # what --size trains with
    "muon-beta2-999-seq-128": {**MUON, **SHORT, "beta2": 0.999},
    "muon-95-beta2-99-seq-128": {**MUON, **SHORT, "momentum": 0.95},
    "muon-beta2-99-seq-128-batch-8": {**MUON, **SHORT, "batch_size": 8},
    "muon-beta2-99-seq-64": {**MUON, "seq_len": 64, "batch_size": 32},
    **{f"muon-beta2-99-seq-128-{name}": MUON | SHORT | each for name, each in CHANGES.items()},
}


@dataclass
class Options:
    """Train each recipe with each learning rate and seed, and report the held-out losses."""

    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Files and folders to train on, as for `ysnake.train --data`."""
    tokens_from: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None
    """Train on the tokens of this run, instead of --text. The text need not be there."""
    size: Literal["3M", "24M", "71M"] = "3M"
    """Size of the model: its number of parameters, about."""
    recipe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("baseline",)
    """Which recipes: any of those in benchmarks/recipes.py, or all."""
    lr: tuple[float, ...] = (3e-3, 6e-3, 12e-3)
    """Peak learning rates. The best should not be the first or the last."""
    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds: first weights and order of the batches."""
    bracket: bool = False
    """Train with the first seed at each rate. While the best rate is the lowest or the highest,
    train at half and at twice that rate too. Train with the other seeds at the best rate only."""
    steps: int | None = 300
    """Steps of 8 x 256 tokens. A recipe with smaller steps takes more of them: all recipes see the
    same tokens, and warm up over the same tokens."""
    minutes: float | None = None
    """Train for this many minutes, instead of a number of steps."""
    warmup_steps: int = 50
    """Steps until the learning rate reaches its peak."""
    evaluations: int = 5
    """Points on the curve of a training."""
    checkpoint_every: int = 100
    """Steps between checkpoints, from which a stopped training continues."""
    at_once: int = 1
    """Trainings at the same time. Each gets its share of the cores. On two cores, two trainings at
    the same time with one thread each need less time than in turn with two threads each."""
    runs: Path = Path("runs/recipes")
    """Where the trainings are kept."""
    out: Path = ROOT / "benchmarks/results/recipes"
    """Where the table, the picture and the curves are written."""


def main(argv: list[str]) -> int:
    """Train what is missing, and write the report after each training."""
    words = cli.together(Options, argv)
    options = tyro.cli(Options, prog="python -m benchmarks.recipes", args=words, config=cli.STYLE)
    names = tuple(RECIPES) if options.recipe == ("all",) else options.recipe
    unknown = set(names) - set(RECIPES)
    if unknown:
        raise InputError(
            f"--recipe: expected some of {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}"
        )
    for name in ("at_once", "evaluations"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag}: expected at least 1, got {getattr(options, name)}")
    read_text(options)
    seeds = options.seed[:1] if options.bracket else options.seed
    wanted = [Training(n, lr, seed) for seed, n, lr in product(seeds, names, options.lr)]
    if options.tokens_from is None:
        train_unless_ended(options, wanted[0], Stop())  # alone, since the others take its tokens
    return train_all(options, wanted)


def read_text(options: Options) -> None:
    """Set --text to the text of --tokens-from, and check the two options."""
    if bool(options.text) == (options.tokens_from is not None):
        raise InputError("--text, --tokens-from: expected one of them")
    if options.tokens_from is not None:
        stored = settings_of.read(options.tokens_from)
        wanted = SIZES[options.size]["vocab_size"]
        if stored.vocab_size != wanted:
            raise InputError(
                f"--tokens-from: --size {options.size} needs a vocabulary of {wanted}, "
                f"got {stored.vocab_size}"
            )
        options.text = stored.data


class Training(NamedTuple):
    """What is trained: a recipe with a learning rate and a seed."""

    recipe: str
    lr: float
    seed: int


def train_all(options: Options, wanted: Sequence[Training]) -> int:
    """Train these and what --bracket adds to them. Returns the exit code.

    If a training fails, the others continue. Ctrl-C and SIGTERM stop the trainings too; the next
    execution continues them.
    """
    submitted: dict[Future[None], Training] = {}
    going: set[Future[None]] = set()
    failed: list[Training] = []
    new = list(wanted)
    pool = ThreadPoolExecutor(options.at_once)
    with ExitStack() as stack:
        show = stack.enter_context(Progress())
        stop = stack.enter_context(Stop(quiet=False).listening())
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = show.add_task("training", total=None)
        while new or going:
            begun = {pool.submit(train_unless_ended, options, each, stop): each for each in new}
            submitted |= begun
            show.update(bar, total=len(submitted))
            done, going = wait(going | set(begun), POLLED, return_when=FIRST_COMPLETED)
            if stop.requested:
                return cli.INTERRUPTED
            for future in done:
                try:
                    future.result()
                except InputError as error:
                    show.console.print(f"error: {error}", markup=False, soft_wrap=True)
                    failed.append(submitted[future])
            show.advance(bar, len(done))
            new = []
            if done:
                found = report(options)
                added = bracket(options, wanted, found, failed) if options.bracket else []
                new = [each for each in added if each not in submitted.values()]
    return cli.FAILED if failed else cli.DONE


def bracket(
    options: Options,
    wanted: Sequence[Training],
    found: Sequence[Trained],
    failed: Sequence[Training],
) -> list[Training]:
    """What --bracket trains next: rates beyond the best, or other seeds at the best rate.

    A recipe has to wait until all its rates that are wanted have been trained or have failed.
    """
    first, *others = options.seed
    losses = {Training(*each): math.inf for each in failed}
    losses |= {Training(each.recipe, each.lr, each.seed): each.loss for each in found}
    more = []
    for name in dict.fromkeys(each.recipe for each in wanted):
        if any(each.recipe == name and each not in losses for each in wanted):
            continue
        rates = {lr: loss for (n, lr, seed), loss in losses.items() if (n, seed) == (name, first)}
        best = min(rates, key=rates.__getitem__)
        if math.isinf(rates[best]):
            continue
        if best in (min(rates), max(rates)):
            more += [Training(name, lr, first) for lr in (best / 2, best * 2)]
        else:
            more += [Training(name, best, seed) for seed in others]
    return more


def train_unless_ended(options: Options, training: Training, stop: Stop) -> None:
    """Start or continue a training, unless it has reached its end or a stop was requested."""
    run = folder(options, *training)
    if not (ended(run) or stop.requested):
        recipe = RECIPES[training.recipe]
        train(options, run, recipe | {"lr": training.lr, "seed": training.seed})


def folder(options: Options, name: str, lr: float, seed: int) -> Path:
    """The folder of a training.

    Its path names the size, the length, the warm-up, --at-once, the recipe, the rate and the seed.
    """
    long = f"{options.minutes:g}-minutes" if options.minutes else f"{options.steps}-steps"
    long += f"-warmup-{options.warmup_steps}"
    long += f"-{options.at_once}-at-once" if options.at_once > 1 else ""
    return options.runs / f"{options.size}-{long}" / name / f"lr-{lr:g}-seed-{seed}"


def ended(run: Path) -> bool:
    """Whether this training has reached its end."""
    try:
        progress = json.loads((run / "last/progress.json").read_text())
    except FileNotFoundError:  # also while the training replaces last/
        return False
    return progress["ended"] in ("steps", "time")


def train(options: Options, run: Path, recipe: dict[str, object]) -> None:
    """Start or continue a training, in a process of its own."""
    command = [sys.executable, "-m", "ysnake.train", "--run", str(run)]
    if (run / "last").is_dir():
        check_text(options, run)
        command.append("--resume")
    else:
        values = SIZES[options.size] | BATCH | RECIPES["baseline"]
        values |= lengths(options, recipe) | recipe
        command += ["--preset", "ys-24m", "--data", *map(str, options.text)]
        if source := options.tokens_from or next(iter(finished(options)), None):
            command += ["--tokens-from", str(source)]
        for name, value in values.items():
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
    command += ["--threads", str(max(1, (os.cpu_count() or 1) // options.at_once))]
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}.log"
    with path.open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise InputError(f"{run}: the training failed, {path} says why")


def lengths(options: Options, recipe: dict[str, object]) -> dict[str, object]:
    """The settings of a recipe that count steps, so that all recipes see the same tokens."""
    own = {name: n for name, n in recipe.items() if name in BATCH and isinstance(n, int)}
    times = math.prod(BATCH.values()) / math.prod((BATCH | own).values())  # as many steps
    steps = round(times * (options.steps or 10**6))
    found: dict[str, object] = {
        "warmup_steps": round(times * options.warmup_steps),
        "eval_every": max(1, round(min(steps / options.evaluations, times * 250))),
        "checkpoint_every": round(times * options.checkpoint_every),
    }
    return found | ({"max_minutes": options.minutes} if options.minutes else {"max_steps": steps})


def finished(options: Options) -> list[Path]:
    """The folders of all finished trainings with this size, length, warm-up and --at-once."""
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
    """The results of `finished`, those of earlier executions too."""
    for path in finished(options):
        settings = json.loads((path / "settings.json").read_text())
        lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        curve = [
            (line["tokens"], line["seconds"], nats(line["bits_per_byte"]))
            for line in lines
            if "bits_per_byte" in line
        ]
        yield Trained(path.parent.name, settings["lr"], settings["seed"], curve)


def nats(bits: float | None) -> float:
    """The same number in nats. None was not finite."""
    return math.inf if bits is None else bits * LN2


def machine(options: Options) -> str:
    """The machine that trains, as it was when the first of these trainings began."""
    path = folder(options, "", 0, 0).parent / "machine.txt"
    if not path.is_file():
        import torch

        chip = processor()
        if torch.cuda.is_available():
            chip = f"{torch.cuda.get_device_name()}, products in bfloat16"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{platform.system()}, {chip}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def report(options: Options) -> list[Trained]:
    """Write the curves, the table and the picture of everything that is trained. Returns it."""
    found = list(trained(options))
    options.out.mkdir(parents=True, exist_ok=True)
    name = folder(options, "", 0, 0).parent.name
    text = ", ".join(path.name for path in options.text)
    where = machine(options)
    title = f"{name} on {text}, {math.prod(BATCH.values()):,} tokens a step ({where})"
    curves = {"title": title, "runs": [vars(each) for each in found]}
    (options.out / f"{name}.json").write_text(json.dumps(curves) + "\n")
    (options.out / f"{name}.md").write_text(markdown(found, title))
    draw(found, title, options.out / f"{name}.png")
    return found


if __name__ == "__main__":
    cli.run(main)
