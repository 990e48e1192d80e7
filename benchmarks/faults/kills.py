"""Trainings that are killed, lose their terminal, meet a full disk or a damaged checkpoint.

Each is resumed until it ends. Its weights, optimizer and metrics must then be equal, bit for bit,
to those of an undisturbed training. Its folder must hold nothing else.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.faults.lost import Lost, environment
from benchmarks.faults.trainer import Ended, SentSignal, Trainer
from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.training.metrics import OF_THIS_EXECUTION

# a tiny model with a checkpoint at each step, so that it spends most of its time writing
OPTIONS = "--d-model 32 --n-layers 2 --d-state 8 --head-dim 8 --seq-len 24 --batch-size 4"
OPTIONS += " --vocab-size 300 --threads 1 --max-steps 12 --eval-every 6 --checkpoint-every 1"
ANIMALS = ("adder", "boa", "cobra", "krait", "mamba", "python", "viper")
MOST_FAULTS = 10  # in one training
CALLS = 120  # a training is killed within this many calls that write, those of about six saves
DISK = "64m"  # size of the disk to fill, where this user may mount one


@dataclass(frozen=True)
class Kind:
    """A kind of training: its number of processes, and further options."""

    name: str
    processes: int = 1
    options: tuple[str, ...] = ()


KINDS = (
    Kind("one process"),
    Kind("one, states carried on", 1, ("--carry-state", "--optimizer", "adamw")),
    Kind("one, factorised head", 1, ("--output-size", "16", "--accumulate", "2")),
    Kind("two processes", 2),
    Kind("two, sharded", 2, ("--shard", "--optimizer", "adamw")),
    Kind("two, sequences split", 2, ("--context-parallel", "2")),
    Kind("four processes", 4),
)


@dataclass
class Undisturbed:
    """A training without faults: how long it took, and what it left."""

    seconds: float
    result: dict[str, Any]
    names: set[str]


@dataclass
class Bench:
    """The folder of all trainings, and the undisturbed ones to compare with."""

    trainer: Trainer
    folder: Path
    data: Path
    undisturbed: dict[Kind, Undisturbed] = field(default_factory=dict)

    def argv(self, kind: Kind) -> list[str]:
        return [*OPTIONS.split(), *kind.options, "--data", str(self.data)]


def corpus(path: Path) -> Path:
    """Write thirty short, different documents."""
    text = [
        f"The {ANIMALS[i % 7]} number {i} sleeps {i * 7 % 23} hours under stone {i * i % 91}. "
        f"It wakes when {ANIMALS[i * 3 % 7]} {i + 1} comes by and counts to {i * 13 % 57}."
        for i in range(30)
    ]
    path.write_text("\n<|endoftext|>\n".join(text) + "\n")
    return path


def prepare(trainer: Trainer, folder: Path, kinds: tuple[Kind, ...] = KINDS) -> Bench:
    """Train each kind to its end, undisturbed."""
    bench = Bench(trainer, folder, corpus(folder / "snakes.txt"))
    for n, kind in enumerate(kinds):
        run = folder / f"whole{n}"
        ended = trainer.train(*bench.argv(kind), "--run", run, processes=kind.processes)
        if any(ended.codes):
            raise Lost(f"a training of {kind.name} failed: {ended.codes} {ended.errors}")
        names = {path.name for path in run.iterdir()}
        bench.undisturbed[kind] = Undisturbed(ended.seconds, result(run), names)
    return bench


def result(run: Path) -> dict[str, Any]:
    """Everything that a training leaves, except what depends on time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = checkpoint.load_training(run / "last")
    del state["progress"]["elapsed"]
    shards = {path.name: load_file(path) for path in (run / "last/optimizer").glob("*")}
    return {
        "metrics": [
            {k: v for k, v in line.items() if k not in OF_THIS_EXECUTION} for line in lines
        ],
        "samples": (run / "samples.txt").read_bytes(),
        "last": (run / "last/model.safetensors").read_bytes(),
        "best": (run / "best/model.safetensors").read_bytes(),
        "state": state,
        "shards": shards,
    }


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Run:
    """A training with faults."""

    def __init__(self, bench: Bench, kind: Kind, seed: str):
        self.bench, self.kind, self.seed = bench, kind, seed
        self.chance = random.Random(seed)
        self.place = bench.folder / "attacked"
        self.place.mkdir()
        self.run = self.place / "run"
        self.mounted = mount(self.place, f"size={DISK}", "-t", "tmpfs", "tmpfs")
        self.happened: list[str] = []

    def go_on(self, **more: Any) -> Ended:
        """Begin the training, or resume it with the same command line."""
        self.happened += [f"{name} {value}" for name, value in more.items()]
        argv = [*self.bench.argv(self.kind), "--run", self.run]
        argv += ["--resume"] if self.run.exists() else []
        ended = self.bench.trainer.train(*argv, processes=self.kind.processes, **more)
        if ended.hung or "Traceback" in ended.errors:
            raise self.lost(f"{'did not end' if ended.hung else 'a traceback'}: {ended}")
        return ended

    def lost(self, what: str) -> Lost:
        return Lost(
            f"{self.kind.name}, seed {self.seed}, after {self.happened}: {what}\n"
            f"the run is in {self.run}"
        )

    def kill(self) -> bool:
        """Kill with -9 at a random moment: one rank, or all ranks at the same time."""
        return self.kills(SentSignal(signal.SIGKILL, self.some_ranks(), self.moment()))

    def kill_in_save(self) -> bool:
        """Kill with -9 while a checkpoint or another file of the run is written."""
        return self.kills(SentSignal(signal.SIGKILL, (0,), calls=self.chance.randint(1, CALLS)))

    def moment(self) -> float:
        """Seconds after the start. A resumed training has seldom ended by then."""
        return self.chance.uniform(0, 0.6 * self.bench.undisturbed[self.kind].seconds)

    def some_ranks(self) -> tuple[int, ...]:
        n = self.kind.processes
        return tuple(range(n)) if self.chance.random() < 0.5 else (self.chance.randrange(n),)

    def kills(self, sent: SentSignal) -> bool:
        """Go on until the signal. Returns whether it killed a rank before the end."""
        ended = self.go_on(sent=sent)
        killed = -signal.SIGKILL in ended.codes
        if not killed and any(ended.codes):
            raise self.lost(f"ended by itself, {ended}")
        return killed

    def hang_up(self) -> bool:
        """Close the terminal. All steps so far must be saved."""
        sent = SentSignal(signal.SIGHUP, self.some_ranks(), self.moment())
        ended = self.go_on(sent=sent)
        if not any(ended.codes):
            return False
        # -SIGHUP: while Python starts, or just after training; -SIGTERM: from the launcher
        if not {*ended.codes} <= {0, 130, -signal.SIGHUP, -signal.SIGTERM}:
            raise self.lost(f"its terminal was closed, and it ended like this: {ended}")
        if 130 in ended.codes and (metrics := self.run / "metrics.jsonl").exists():
            done = len(metrics.read_text().splitlines())
            saved = json.loads((self.run / "last/progress.json").read_text())["step"]
            if saved < done:
                raise self.lost(f"its terminal was closed: {done} steps done, {saved} saved")
        return True

    def full_disk(self) -> bool:
        """Limit the size of a file, or the free space of the disk."""
        sizes = [path.stat().st_size for path in (self.bench.folder / "whole0/last").iterdir()]
        if self.mounted and self.chance.random() < 0.5:
            used = shutil.disk_usage(self.place).used
            room = used + self.chance.randrange(3 * sum(sizes))
            mount(self.place, f"remount,size={room}")
            self.happened.append(f"room for {room} bytes on the disk")
            ended = self.go_on()
            mount(self.place, f"remount,size={DISK}")
        else:
            ended = self.go_on(file_limit=self.chance.randrange(2000, 2 * max(sizes)))
        if not any(ended.codes):
            return False
        self.expect_line(ended)
        return True

    def expect_line(self, ended: Ended) -> str:
        """Check for exit code 2 and one line that names a path. Returns the line."""
        lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
        if 2 not in ended.codes or len(lines) != 1 or str(self.place) not in lines[0]:
            raise self.lost(f"expected one line that names a file: {ended}")
        return lines[0]

    def damage(self) -> bool:
        """Flip a bit of a file in the checkpoint, or cut off its end."""
        last = self.run / "last"
        if not last.exists():
            return False
        path = self.chance.choice(sorted(p for p in last.rglob("*") if p.is_file()))
        content = path.read_bytes()
        at = self.chance.randrange(len(content))
        if self.chance.random() < 0.3:
            path.write_bytes(content[:at])
        else:
            flipped = content[at] ^ (1 << self.chance.randrange(8))
            path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        self.happened.append(f"damage of byte {at} in {path.name}")
        ended = self.go_on()
        if any(ended.codes):  # there is no earlier checkpoint, so it is refused
            line = self.expect_line(ended)
            if (self.run / "last.old").exists() or path.name not in line:
                raise self.lost(f"the checkpoint before was not used: {ended}")
            path.write_bytes(content)
        return True

    def attack(self) -> Counter[str]:
        """Make some faults, then go on to the end and compare. Returns counts of the faults."""
        faults = [*self.faults(), self.kill, self.kill_in_save]  # the last two more often
        counts: Counter[str] = Counter()
        for _ in range(self.chance.randint(2, MOST_FAULTS)):
            fault = self.chance.choice(faults)
            if fault():
                counts[fault.__name__] += 1
        self.finish()
        return counts

    def faults(self) -> list[Callable[[], bool]]:
        """All faults. Each returns whether it happened before the training ended."""
        return [self.kill, self.kill_in_save, self.hang_up, self.full_disk, self.damage]

    def finish(self) -> None:
        """Go on to the end, compare, and remove the run."""
        ended = self.go_on()
        if any(ended.codes):
            raise self.lost(f"cannot be resumed: {ended}")
        self.compare()
        self.remove()

    def remove(self) -> None:
        """Remove the run, and the disk that it is on."""
        if self.mounted:
            subprocess.run(["umount", "-l", self.place], check=True)
        shutil.rmtree(self.place)

    def compare(self) -> None:
        expected = self.bench.undisturbed[self.kind]
        try:
            found = result(self.run)
        except (OSError, ValueError, InputError) as error:
            raise self.lost(f"cannot be read: {error}") from error
        different = [
            name for name, value in expected.result.items() if not same(value, found[name])
        ]
        if different:
            raise self.lost(f"not equal to the undisturbed training: {', '.join(different)}")
        names = {path.name for path in self.run.iterdir()} - {"last.damaged"}
        if names != expected.names or [*self.place.iterdir()] != [self.run]:
            raise self.lost(f"left over: {names ^ expected.names} {[*self.place.iterdir()]}")


def mount(folder: Path, options: str, *more: str) -> bool:
    """Mount a small disk, or change its size. False means that this user may not."""
    if shutil.which("mount") is None:
        return False
    done = subprocess.run(["mount", "-o", options, *more, folder], capture_output=True)
    return done.returncode == 0


class Kills:
    """The attack on trainings, one after another."""

    name = "trainings"

    def __init__(self, folder: Path, seed: int, kinds: tuple[Kind, ...] = KINDS):
        self.seed, self.kinds, self.count = seed, kinds, 0
        self.counts: Counter[str] = Counter()
        self.trainer = Trainer(environment())
        self.bench = prepare(self.trainer, folder, kinds)

    def go(self, seconds: float) -> str:
        """Attack trainings for this many seconds. Returns a summary of all so far."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            kind = self.kinds[self.count % len(self.kinds)]
            self.counts += Run(self.bench, kind, f"{self.seed}/{self.count}").attack()
            self.count += 1
        return f"{self.count} {self.name}, all equal to undisturbed ones: " + ", ".join(
            f"{n} times {name.replace('_', ' ')}" for name, n in sorted(self.counts.items())
        )

    def close(self) -> None:
        """End the process that forks the trainings."""
        self.trainer.close()
