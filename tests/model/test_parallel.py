"""Many processes take the steps that one process takes.

torchrun starts them where a test is about starting, ending or restarting. Elsewhere they are forked
as torchrun would start them, which is quicker.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import ROOT, TINY, corpus, entry, environment, model
from test_train import metrics

from ysnake import train
from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.training import launch, parallel
from ysnake.training.optimizer import make_moments, make_optimizer

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="forks processes and finds them by /proc"
)
STEPS = ["--max-steps", "8", "--eval-every", "8", "--vocab-size", "300"]
OTHER = ["--carry-state", "--accumulate", "2", "--output-size", "16", "--optimizer", "muon"]


def torchrun(processes, *arguments, cwd, **options):
    """Start that many processes; returns torchrun's own."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        **{"cwd": cwd, "env": environment(), "stdin": subprocess.DEVNULL} | options,
    )


def done(cwd, *groups):
    """For each pair of a number and tasks of ranks.py, let that many ranks do the tasks."""
    command = [sys.executable, ROOT / "tests/model/ranks.py", json.dumps(groups)]
    one_thread = environment() | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=cwd, env=one_thread, stdout=subprocess.DEVNULL, check=True)


def done_by_torchrun(tasks, cwd, *options):
    """Let one rank that torchrun starts do the tasks."""
    arguments = [*options, ROOT / "tests/model/ranks.py", json.dumps(tasks)]
    process = torchrun(1, *arguments, cwd=cwd, stdout=subprocess.DEVNULL)
    assert process.wait(300) == 0


def training(run, *options, **more):
    data = ["--data", "snakes.txt", "--run", run]
    return ["trained", {"argv": [*TINY, *STEPS, *data, *map(str, options)], **more}]


def resumed(run, *options):
    return ["trained", {"argv": ["--run", run, "--resume", *map(str, options)]}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: of one process, of two, of four, and some that changed their number."""
    folder = tmp_path_factory.mktemp("runs")
    corpus(folder)
    before = torch.get_num_threads(), Path.cwd()
    os.chdir(folder)
    try:
        for run, options in {"one": [], "one-other": OTHER}.items():
            train.main([*training(run, *options)[1]["argv"], "--threads", "1"])
        done(folder, (2, BY_TWO), (1, COPIED), (4, BY_FOUR))
        for run in STOPPED:
            assert train.main(["--run", f"{run}-one", "--resume"]) == 0
        done_by_torchrun(RESTARTED, folder, "--max-restarts", 1)
    finally:
        os.chdir(before[1])
        torch.set_num_threads(before[0])
    return folder


BY_TWO = [
    training("two-ddp"),
    training("two-stopped", *OTHER, stop_after=7),
    training("two-shard-stopped", *OTHER, "--shard", stop_after=9),
    training("two-poisoned", "--max-steps", 3, poisoned=2),
]
STOPPED = ("two-stopped", "two-shard-stopped")
COPIED = [
    ["copied", {"run": run, "copy": f"{run}-{number}"}]
    for run in STOPPED
    for number in ("one", "four")
]
BY_FOUR = [
    training("four-shard", "--shard"),
    training("four-context", "--context-parallel", 4),
    training("four-all", "--context-parallel", 2, "--shard", "--recompute"),
    resumed("two-stopped-four", "--shard"),
    resumed("two-shard-stopped-four"),
    *(
        ["gradients", {"out": f"gradients-{k}", "n_groups": 2} | options]
        for k, options in enumerate(
            (
                {"context": 4, "length": 48, "documents": 9, "counted": True},
                {"context": 4, "length": 48, "documents": 1},
                {"context": 4, "length": 12, "documents": 7},  # as short as the convolution allows
                {"context": 2, "length": 48, "documents": 5, "sharded": True},
            )
        )
    ),
]
RESTARTED = [training("restarted", "--checkpoint-every", 2, "--threads", 1, killed_after=5)]
EQUAL = {
    "one": ["restarted", "two-ddp", "four-shard", "four-context", "four-all"],
    "one-other": [
        *("two-stopped-one", "two-stopped-four", "two-shard-stopped-one", "two-shard-stopped-four"),
    ],
}


@pytest.mark.parametrize(("one", "many"), [(a, b) for a, runs in EQUAL.items() for b in runs])
def test_many_processes_train_as_one(runs, one, many):
    """Also those stopped by a signal to one rank alone, and resumed by another number."""
    first, second = metrics(runs / one), metrics(runs / many)
    assert len(first) == len(second) == 8
    for a, b in zip(first, second, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=3e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["tokens"], b["lr"]) == (a["tokens"], pytest.approx(a["lr"]))
        assert b.keys() - {"resumed"} == a.keys() - {"resumed"}
        assert b.get("val_loss", 0) == pytest.approx(a.get("val_loss", 0), rel=3e-6)
    for which in ("last", "best"):
        weights = [dict(checkpoint.load(runs / r / which).named_parameters()) for r in (one, many)]
        assert weights[0].keys() == weights[1].keys()
        for name, p in weights[0].items():
            assert torch.allclose(p, weights[1][name], atol=1e-4), name


def test_all_skip_the_step_that_one_rank_cannot_take(runs):
    one, two = metrics(runs / "one")[:3], metrics(runs / "two-poisoned")
    assert [m["skipped"] for m in two] == [0, 1, 1]
    assert two[1]["train_loss"] is None
    assert two[2]["train_loss"] == pytest.approx(one[2]["train_loss"], rel=0.01)
    model = checkpoint.load(runs / "two-poisoned/last")
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_first_rank_alone_writes(runs):
    files = {p.name for p in (runs / "one").rglob("*")}
    for many in ("two-ddp", "four-context"):
        # launch.txt names the launch of torchrun, by which restarted processes know their run
        assert {p.name for p in (runs / many).rglob("*")} == files | {"launch.txt"}
    text = (runs / "four-all/samples.txt").read_text()
    assert text.count(" >>> ") == 1
    shards = {p.name for p in (runs / "four-all/last/optimizer").iterdir()}
    assert len(shards) == 4
    manifest = json.loads((runs / "four-all/last/manifest.json").read_text())
    assert {f"optimizer/{name}" for name in shards} < manifest.keys()


def test_a_damaged_shard_of_the_optimizer_is_named(runs, tmp_path):
    shutil.copytree(runs / "four-all/last", tmp_path / "last")
    damaged = sorted((tmp_path / "last/optimizer").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=damaged.name):
        checkpoint.load_training(tmp_path / "last")


@pytest.mark.parametrize("number", range(4))
def test_split_sequences_have_the_gradients_of_whole_ones(runs, number):
    """With documents that cross the borders between ranks, and with one that crosses all."""
    for rank in range(4):
        errors = json.loads((runs / f"gradients-{number}.{rank}.json").read_text())["errors"]
        rounded = {name for name in errors if name.endswith("A_log")}  # float32 in any model
        assert max(errors[name] for name in rounded) < 1e-6
        assert max(errors[name] for name in errors.keys() - rounded) < 1e-10


def test_a_layer_sends_one_state_and_one_edge_each_way(runs):
    n_layers, batch = 2, 2
    edge, state = (batch, 64 + 2 * 2 * 8, 3), (batch, 8, 8, 8)  # tokens before it; P by N per head
    both = sorted([edge, state] * n_layers)
    for rank in range(4):
        passed = json.loads((runs / f"gradients-0.{rank}.json").read_text())["passed"]
        to_next, from_next = (both if rank < 3 else [] for _ in range(2))
        to_before, from_before = (both if rank > 0 else [] for _ in range(2))
        shapes = {key: sorted(map(tuple, value)) for key, value in passed.items()}
        assert shapes["forward sent"] == to_next
        assert shapes["forward received"] == from_before
        assert shapes["backward sent"] == to_before
        assert shapes["backward received"] == from_next
        assert shapes["other"] == []


def test_a_rank_keeps_only_the_last_state_that_it_sent(runs):
    for rank in range(4):
        kept = json.loads((runs / f"gradients-0.{rank}.json").read_text())["kept"]
        assert kept == 1  # each rank has a neighbour to which it sends


@pytest.fixture
def store(monkeypatch):
    """The store in which processes find each other, as torchrun keeps it; here of one process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in {**address, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_a_restart_reads_no_address_of_the_processes_before(store, monkeypatch):
    written = []
    for restarts in range(3):
        before = store.num_keys()
        monkeypatch.setenv(launch.RESTARTS, str(restarts))
        with parallel.process_group("cpu", 1, False) as ranks:
            assert ranks.size == 1
        written.append(store.num_keys() - before)
    assert written[1] == written[2] > 0


def test_a_sharded_optimizer_that_cannot_be_written_or_read_is_named(store, tmp_path):
    (tmp_path / "file").touch()
    with parallel.process_group("cpu", 1, True) as ranks:
        one = model()
        ranks.distribute(one, "cpu")
        optimizer = make_optimizer(one, 0.1)
        make_moments(optimizer)
        with pytest.raises(InputError, match=r"file/x: cannot be written \(.*Not a directory"):
            ranks.save_optimizer(one, optimizer, tmp_path / "file/x")
        saved = ranks.save_optimizer(one, optimizer, tmp_path / "x") | {"steps": 1}
        ranks.load_optimizer(one, optimizer, saved, tmp_path / "x")
        (shard,) = (tmp_path / "x").iterdir()
        os.truncate(shard, 100)
        with pytest.raises(InputError, match=r"x: damaged \("):
            ranks.load_optimizer(one, optimizer, saved, tmp_path / "x")


def test_a_killed_rank_ends_the_others_and_the_run_resumes(tmp_path):
    corpus(tmp_path)
    options = [*training("run", "--checkpoint-every", 5, "--max-steps", 100_000)[1]["argv"]]
    with torchrun(
        *(2, "-m", "--", "ysnake.train", *options, "--shard"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        lines = tmp_path / "run/metrics.jsonl"
        while not lines.exists() or lines.read_text().count("\n") < 12:
            assert launcher.poll() is None
            time.sleep(0.05)
        os.kill(process_of_rank(1, launcher.pid), signal.SIGKILL)
        errors = launcher.communicate(timeout=60)[1]
        assert launcher.returncode == 1
    assert errors.count("error: lost contact with another process") == 1
    cause = errors[errors.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "SIGKILL" in cause
    before = checkpoint.load_training(tmp_path / "run/last")["progress"]["step"]
    assert before >= 5
    assert (
        train.main(["--run", str(tmp_path / "run"), "--resume", "--max-steps", str(before + 3)])
        == 0
    )
    assert len(metrics(tmp_path / "run")) == before + 3


def process_of_rank(rank, launcher):
    tasks = Path(f"/proc/{launcher}/task/{launcher}/children")
    for pid in map(int, tasks.read_text().split()):
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"no process has rank {rank}")


WRONG = {
    "--batch-size: expected a multiple of the 3 processes, got 4": (3, []),
    "--batch-size: expected a multiple of the 3 groups of processes, got 4": (
        *(6, ["--context-parallel", "2"]),
    ),
    "--context-parallel: expected a divisor of 4 processes, got 3": (
        4,
        ["--context-parallel", "3"],
    ),
    "--context-parallel: expected at least 1, got 0": (4, ["--context-parallel", "0"]),
    "--seq-len: 24 tokens cannot be split evenly over the 5": (5, ["--context-parallel", "5"]),
    "--seq-len: 2 tokens for each of 12 processes are fewer": (12, ["--context-parallel", "12"]),
    "--memory: works with one process only": (2, ["--memory", "8GB"]),
    "--carry-state: cannot be combined with --context-parallel": (
        2,
        ["--context-parallel", "2", "--carry-state"],
    ),
    "--device: expected auto, cpu or cuda": (2, ["--device", "mps"]),
    "--shard: needs several processes; start them with torchrun": (None, ["--shard"]),
    "--context-parallel: needs several processes": (None, ["--context-parallel", "2"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_combinations_are_said_by_one_rank(tmp_path, monkeypatch, message):
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    size, options = WRONG[message]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "REPORT_TIME", 0)
    for rank in (0,) if size is None else (0, size - 1):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", str(size))
            monkeypatch.setenv("RANK", str(rank))
        code, _, errors = entry(train.main, *TINY, "--data", "snakes.txt", *options)
        assert code == 2
        assert errors.count("\n") == errors.count(message) == (rank == 0)
    assert [p.name for p in tmp_path.iterdir()] == ["snakes.txt"]


def test_an_unknown_option_is_said_by_one_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "REPORT_TIME", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        code, _, errors = entry(train.main, "--no-such-option", "--run", "run")
        assert code == 2
        assert errors.count("Unrecognized options: --no-such-option") == (rank == 0)
    assert not list(tmp_path.iterdir())


def test_an_error_reaches_the_screen_once(tmp_path):
    """One that the first rank alone finds."""
    process = torchrun(
        *(2, "-m", "--", "ysnake.train", "--data", "missing", "--run", "run"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    errors = process.communicate(timeout=120)[1]
    assert errors.count("error: missing: no such file or folder") == 1
    assert "exitcode  : 2" in errors[errors.index("Root Cause") :]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_long_context_on_four_ranks_takes_a_quarter_of_the_memory(tmp_path):
    sizes = {"length": 65_536, "d_model": 64, "n_layers": 4, "d_state": 16, "head_dim": 16}
    for number, name in ((1, "one"), (4, "four")):
        done(tmp_path, (number, [["memory", {"out": name, "context": number, **sizes}]]))
    one = json.loads((tmp_path / "one.0.json").read_text())
    expected = torch.load(tmp_path / "one.0.grads", weights_only=True)
    for rank in range(4):
        four = json.loads((tmp_path / f"four.{rank}.json").read_text())
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["kept"] < 0.26 * one["kept"]
        assert four["grown"] < 0.4 * one["grown"]
        for name, grad in torch.load(tmp_path / f"four.{rank}.grads", weights_only=True).items():
            assert (grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name
