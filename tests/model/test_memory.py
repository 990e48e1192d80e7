"""The prediction of memory: parameters exact, peaks near those of real runs, --memory kept to."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import TINY, corpus, model, python

from ysnake.checkpoints import checkpoint
from ysnake.model.config import ModelConfig
from ysnake.shared.errors import InputError
from ysnake.training import memory
from ysnake.training.options import Settings

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZES = {"vocab_size": 1024, "d_model": 256, "n_layers": 3, "d_state": 64}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_groups": 2},
        {"tied": False},
        {"tied": False, "output_size": 16},
        {"conv_bias": False, "conv_width": 2},
    ],
)
def test_parameters_are_counted_exactly(sizes):
    m = model(**sizes)
    assert memory.predict(m.config, Settings()).parameters == m.n_parameters()


CASES = [
    (24, 128, False, False, "adamw", "float32"),
    (24, 128, False, False, "adamw", "bfloat16"),
    (24, 128, True, False, "adamw", "float32"),
    (24, 128, False, True, "muon", "float32"),
]
PEAK = """
import json, os, sys
import torch
import torch._dynamo  # the first optimizer imports it
from ysnake_kernels.allocator import keep_freed_memory
from ysnake.model.config import ModelConfig
from ysnake.model import LayerState, Model
from ysnake.training.optimizer import make_moments, make_optimizer
from ysnake.training.run import KEPT_RECOMPUTING
def peak():  # resident kilobytes; ru_maxrss would begin with the parent's
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

for case in json.loads(sys.argv[1]):
    if os.fork() == 0:
        break  # a case has a process of its own
    if os.wait()[1]:
        sys.exit(1)
else:
    sys.exit()
batch, length, recompute, carry_state, kind, precision = case
if precision == "bfloat16":
    torch.set_float32_matmul_precision("medium")
keep_freed_memory(KEPT_RECOMPUTING) if recompute else keep_freed_memory()
torch.set_num_threads(1)
model = Model(ModelConfig(vocab_size=1024, d_model=256, n_layers=3, d_state=64))
model.backbone.recompute = recompute
optimizer = make_optimizer(model, 0.1, kind)
before = peak()
make_moments(optimizer)
carried = model.empty_state(batch) if carry_state else None
for _ in range(2):
    optimizer.zero_grad()
    state = carried and [LayerState(layer.conv, layer.ssm) for layer in carried]
    ids = torch.randint(0, 1024, (batch, length))
    (model.loss(ids, ids, None, state) / ids.numel()).backward()
    optimizer.step()
    carried = state
print(peak() - before)
"""


@pytest.mark.skipif(
    not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text(),
    reason="this system has no huge pages",
)
def test_what_reads_weights_has_huge_pages():
    code = """
from ysnake.shared import cli
cli.tune_memory()
import os, torch
kept = torch.ones(25_000_000)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line for line in lines if line.startswith("AnonHugePages")).split()[1])
assert "THP_MEM_ALLOC_ENABLE" not in os.environ
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0  # kilobytes


@pytest.fixture(scope="module")
def added():
    """The kilobytes that steps add to a process, by case."""
    command = [sys.executable, "-c", PEAK, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return dict(zip(CASES, map(int, done.stdout.split()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted as on Linux")
@pytest.mark.parametrize("case", CASES)
def test_what_a_step_adds_is_foreseen(added, case):
    names = ("batch_size", "seq_len", "recompute", "carry_state", "optimizer", "precision")
    plan = memory.predict(ModelConfig(**SIZES), Settings(**dict(zip(names, case, strict=True))))
    weights = 4 * plan.parameters  # which were there before
    expected = plan.kept + plan.working + plan.weights - weights
    assert abs(added[case] * 1024 / expected - 1) < 0.25


def test_the_largest_batch_fits_and_the_next_does_not():
    config, settings = ModelConfig(**SIZES), Settings(seq_len=256)
    for limit in (0.6e9, 2e9):
        size = memory.largest_batch(config, settings, limit)
        assert memory.predict(config, replace(settings, batch_size=size)).peak <= limit
        assert memory.predict(config, replace(settings, batch_size=size + 1)).peak > limit
    assert memory.largest_batch(config, settings, 1e8) == 0


def test_a_step_keeps_its_windows_whatever_fits():
    config = ModelConfig(**SIZES)
    for gigabytes in (0.6, 0.7, 1.0, 8):
        settings = Settings(batch_size=24, accumulate=2, seq_len=512, memory=f"{gigabytes}GB")
        memory.choose_batch_size(settings, config)
        assert settings.batch_size * settings.accumulate == 48
        plan = memory.predict(config, settings)
        assert plan.peak <= gigabytes * 1e9
    assert settings.batch_size == 48
    with pytest.raises(InputError, match=r"--memory: 0.10 GB are not enough, .* takes 0\.\d\d GB"):
        memory.choose_batch_size(Settings(seq_len=512, memory="100MB"), config)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("500 MB", 5e8), ("1.5g", 1.5e9), ("1000000", 1e6)]
)
def test_sizes_as_people_write_them(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0GB", "8 PB", "1e9GB", "8", "999K"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="--memory: expected a size like 8GB, got"):
        memory.parse_size(text)


def test_the_plan_is_printed_and_nothing_is_made(tmp_path):
    options = ["--data", corpus(tmp_path), "--plan", *TINY]
    done = python("ysnake.train", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("parameters", "predicted peak", "largest --batch-size that fits"):
        assert words in done.stdout
    rows = [line.rstrip().split(maxsplit=1) for line in done.stdout.splitlines()]
    assert ["24", "--seq-len"] in rows
    assert ["4", "--batch-size"] in rows
    assert ["automatic", "--chunk-size"] in rows
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_less_memory_gives_the_same_weights(tmp_path):
    data = ["--data", corpus(tmp_path), *TINY, "--max-steps", "3", "--threads", "1"]

    def train(name, *options):
        done = python("ysnake.train", *data, *options, "--run", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "last/model.safetensors")

    plain, again = train("plain"), train("again", "--recompute")
    config = checkpoint.load_config(tmp_path / "plain/last")
    small = train(
        "small",
        "--memory",
        str(int(memory.predict(config, Settings(batch_size=2, seq_len=24)).peak)),
    )
    settings = json.loads((tmp_path / "small/settings.json").read_text())
    assert (settings["batch_size"], settings["accumulate"]) == (2, 2)
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.allclose(tensor, small[name], atol=1e-4), name
