"""Files from strangers: each must load, or be refused in one line that names it.

Processes of their own change good files as hypothesis draws it, and read them, thousands a minute.
A process ends itself if a file takes longer than `LONGEST`.
"""

import faulthandler
import json
import logging
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faults.lost import Lost, environment, resident

if TYPE_CHECKING:
    from ysnake.inference.generate import Context

LONGEST = 20.0  # seconds within which a file must be read or refused
ADDRESSES = 8 << 30  # most bytes of address space of the process, which begins with about 3 GB
GROWTH = 300_000_000  # bytes by which the process may grow, whatever it reads
WORKERS, SEEDS_APART = 2, 1_000_000  # processes, and what separates their seeds
DRAWS, EACH = 20, 20  # draws for a target before the next one, and files of each draw
OPTION = r"(--)?[a-z-]+: "  # a message about settings.json may begin so
TEMPLATE = """{% set ns = namespace(text='') %}{% for m in messages[0:] %}{% if loop.first %}
{% set ns.text = ns.text ~ m['role'] + ': ' %}{% endif %}{{ m.content.strip() | trim }}
{{ eos_token }}{% endfor %}{{ ns.text }}{% if add_generation_prompt %}assistant{% endif %}"""
TEXT = "The boa sleeps <|endoftext|> 蛇\n"


@dataclass(frozen=True)
class Target:
    """A file to change, how it is changed, and the function that then reads it."""

    file: str  # its path in the folder
    change: str  # the name of a function in `mutations`
    read: Callable[[Path], None]

    @property
    def name(self) -> str:
        return f"{self.file} {self.change}"


def complete(folder: Path) -> None:
    """Read a checkpoint and complete a text with it."""
    import torch

    from ysnake.checkpoints import checkpoint
    from ysnake.text import tokenizer as tokenizers

    _, tokenizer, model = checkpoint.load_all(folder)
    ids = tokenizers.encode(tokenizer, TEXT)
    tokenizers.decode(tokenizer, ids)
    with torch.no_grad():
        model(torch.tensor([ids[:8] or [0]]))


def chat(folder: Path) -> None:
    """Compile a chat template and render some messages with it."""
    from ysnake.checkpoints import checkpoint
    from ysnake.text import chat_template

    template = chat_template.load(folder, checkpoint.load_tokenizer(folder))
    template.render([{"role": role, "content": TEXT} for role in ("system", "user", "user")])


def go_on(folder: Path) -> None:
    """Resume a training run. Nothing is written."""
    from rich.console import Console

    from ysnake.training import settings
    from ysnake.training.parallel import Ranks
    from ysnake.training.resume import resume

    resume(replace(settings.read(folder), resume=False), Ranks(), Console(quiet=True))


def load_state(folder: Path) -> None:
    """Load a state that `ysnake.run --save-state` has written."""
    context_of(folder / "model").load(folder / "state")


@cache
def context_of(folder: Path) -> "Context":
    from ysnake.checkpoints import checkpoint
    from ysnake.inference.generate import Context

    return Context(checkpoint.load(folder), 300)


def targets() -> list[Target]:
    """All files to change, in the folders that `make` makes."""
    return [
        *(Target("model/config.json", change, complete) for change in JSON),
        *(Target("model/tokenizer.json", change, complete) for change in JSON),
        *(Target("word/tokenizer.json", change, complete) for change in JSON),
        *(Target("model/chat_template.jinja", change, chat) for change in PLAIN),
        *(Target("whole/manifest.json", change, complete) for change in JSON),
        *(Target("shards/model.safetensors.index.json", change, complete) for change in JSON),
        *(Target("state-spaces/config.json", change, complete) for change in JSON),
        *(Target("model/model.safetensors", change, complete) for change in TENSORS),
        *(Target("state-spaces/pytorch_model.bin", change, complete) for change in PICKLE),
        *(Target("run/last/training_state.pt", change, go_on) for change in PICKLE),
        *(Target("run/settings.json", change, go_on) for change in JSON),
        Target("run/data/train.tokens", "bytes_changed", go_on),
        *(Target("state", change, load_state) for change in TENSORS),
    ]


PLAIN = ("bytes_changed", "noise")
JSON = ("bytes_changed", "values_exchanged", "noise")
TENSORS = ("bytes_changed", "header_changed", "noise")
PICKLE = ("bytes_changed", "member_changed", "noise")
WHERE = {go_on: "run", load_state: "."}  # the folder that is read, where it is not that of the file


def make(folder: Path) -> None:
    """Make a good file of each kind."""
    import torch
    from rich.console import Console

    from benchmarks.faults.kills import OPTIONS, corpus
    from ysnake.checkpoints import checkpoint
    from ysnake.model import Model
    from ysnake.model.config import ModelConfig
    from ysnake.text import tokenizer as tokenizers
    from ysnake.training import settings
    from ysnake.training.new_run import start

    data = corpus(folder / "snakes.txt")
    texts = [data.read_text()]
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size=320, d_model=16, n_layers=1, d_state=8, head_dim=8))
    for name, kind, vocab in (("model", "bpe", 300), ("word", "word", 300)):
        checkpoint.save(folder / name, model, tokenizers.train(kind, texts, vocab))
    shutil.copytree(folder / "model", folder / "whole")
    (folder / "model/chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(folder / "model", folder / "shards")
    for name in ("model", "word", "shards"):  # checkpoints of strangers have no manifest
        (folder / name / "manifest.json").unlink()
    shard = folder / "shards/model.safetensors"
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    shard.rename(shard.with_name("a.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps(index))

    state_spaces = folder / "state-spaces"
    state_spaces.mkdir()
    shutil.copy(folder / "model/tokenizer.json", state_spaces)
    layer = {"layer": "Mamba2", "d_state": 8, "headdim": 8}
    config = {"d_model": 16, "n_layer": 1, "vocab_size": 320, "ssm_cfg": layer}
    (state_spaces / "config.json").write_text(json.dumps(config))
    torch.save(dict(model.state_dict()), state_spaces / "pytorch_model.bin")

    argv = [*OPTIONS.split(), "--data", str(data), "--run", str(folder / "run")]
    start(settings.parse(argv), Console(quiet=True))
    for manifest in (folder / "run").rglob("manifest.json"):
        manifest.unlink()
    context = context_of(folder / "model")
    context.feed([0, 5, 7])
    context.save(folder / "state")


def attack(folder: Path, target: Target, seed: int, draws: int) -> None:
    """Read `EACH` changed files of each draw. Raises any error but a refusal in one line."""
    import hypothesis
    from hypothesis import strategies

    from benchmarks.faults import mutations
    from ysnake.shared.errors import InputError

    path = folder / target.file
    content = path.read_bytes()
    read = WHERE.get(target.read)
    where = path.parent if read is None else folder / read
    strategy = getattr(mutations, target.change)()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=draws,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy, strategies.integers(0, 2**32))
    def check(mutate: Callable[[bytes, random.Random], bytes], where_from: int) -> None:
        chance = random.Random(where_from)
        for _ in range(EACH):
            path.write_bytes(mutate(content, chance))
            faulthandler.dump_traceback_later(LONGEST, exit=True)
            try:
                target.read(where)
            except InputError as error:
                said = str(error)
                named = str(folder) in said or re.match(OPTION, said)
                assert named, f"names neither a file nor an option: {said!r}"
                assert "\n" not in said, f"more than one line: {said!r}"
            finally:
                faulthandler.cancel_dump_traceback_later()

    check()
    path.write_bytes(content)


def serve(folder: Path, seed: int) -> None:
    """For each line of standard input attack the next target, and print the number of files."""
    import torch

    torch.set_num_threads(1)
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, resource.RLIM_INFINITY))
    make(folder)
    every = targets()
    for number, line in enumerate(sys.stdin):
        target = every[number % len(every)]
        print(f"{target.name} seed {seed + number}", file=sys.stderr, flush=True)
        attack(folder, target, seed + number, int(line))
        print(number + 1, flush=True)


class Worker:
    """A process that attacks one target for each line that it is sent."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.folder.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.faults.files", self.folder, str(seed)],
                env=environment() | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.first_size = 0

    def begin(self, draws: int) -> None:
        """Attack the next target with this many draws."""
        print(draws, file=self.process.stdin, flush=True)

    def wait(self) -> None:
        """Wait until the target is done. Raises Lost if the process ended or has grown."""
        if not self.process.stdout.readline():
            code = self.process.wait()
            raise Lost(f"{code}: {self.log.read_text()}\nthe file is in {self.folder}")
        size = resident(self.process.pid)
        self.first_size = self.first_size or size
        if size > self.first_size + GROWTH:
            raise Lost(f"reading files took {size:,} bytes: {self.log.read_text()}")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)


class Files:
    """The attack on files, in `WORKERS` processes with different seeds."""

    name = "fuzzed files"

    def __init__(self, folder: Path, seed: int):
        seeds = (seed + SEEDS_APART * n for n in range(WORKERS))
        self.workers = [Worker(folder / f"files{n}", own) for n, own in enumerate(seeds)]
        self.count = 0

    def go(self, seconds: float, draws: int = DRAWS) -> str:
        """Attack for this many seconds. Returns a summary of all files so far."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for worker in self.workers:
                worker.begin(draws)
            for worker in self.workers:
                worker.wait()
            self.count += draws * EACH * WORKERS
        return f"{self.count:,} {self.name}"

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
