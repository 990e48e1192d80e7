"""A run folder has one owner, and what a start or a kill leaves behind is never taken for a run."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from itertools import count

import pytest
from rich.console import Console
from small import TINY, corpus, entry, environment

from ysnake import runs, train
from ysnake.shared import cli, run_lock
from ysnake.shared.errors import InputError
from ysnake.training import new_run, open_run, parallel, run_folder, settings

OPTIONS = [*TINY, "--vocab-size", "300", "--threads", "1", "--max-steps", "2"]
HOLD = """
import sys, time
from pathlib import Path
from ysnake.shared import run_lock
with run_lock.lock(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


def another_process_holds(path):
    """A process that has locked the file; it runs until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert entry(train.main, *OPTIONS, "--data", data, "--run", folder)[0] == 0
    return folder


def test_a_lock_has_one_holder_and_ends_with_its_process(tmp_path):
    path = tmp_path / "x.lock"
    process = another_process_holds(path)
    busy = rf"in use \(process {process.pid} on "
    with pytest.raises(InputError, match=busy), run_lock.lock(path, "in use"):
        pass
    process.kill()
    process.wait()
    assert path.exists()
    with run_lock.lock(path, "in use") as held:
        assert held
        with pytest.raises(InputError, match="in use"), run_lock.lock(path, "in use"):
            pass
    assert not path.exists()


def test_a_lock_can_be_waited_for(tmp_path):
    path = tmp_path / "x.lock"
    process = another_process_holds(path)
    began = time.monotonic()
    with pytest.raises(InputError, match="in use"), run_lock.lock(path, "in use", 0.2):
        pass
    assert time.monotonic() - began >= 0.2
    process.kill()
    with run_lock.lock(path, "in use", 30):
        pass


@pytest.mark.usefixtures("without_locks")
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, caplog):
    for _ in range(2):
        with run_lock.lock(tmp_path / "x.lock", "in use") as held:
            assert not held
    assert caplog.text.count("this file system has no locks") == 1
    assert str(tmp_path) in caplog.text


def test_a_run_in_training_is_not_taken_up_by_a_second_process(run):
    before = (run / "metrics.jsonl").read_bytes()
    process = another_process_holds(run / run_lock.TRAINING)
    code, _, errors = entry(train.main, "--run", run, "--resume", "--max-steps", "4")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{run}: another process is training this run (process {process.pid} on" in errors
    assert (run / "metrics.jsonl").read_bytes() == before
    process.kill()
    process.wait()
    (run / "loss.png.0123abcd.new").touch()  # of a process that was killed while it drew
    assert entry(train.main, "--run", run, "--resume", "--max-steps", "4")[0] == 0
    assert not list(run.glob("*.new"))
    assert not (run / run_lock.TRAINING).exists()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    for _ in range(2):
        assert entry(train.main, *OPTIONS, "--data", data)[0] == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"quick-20260101-000000", "quick-20260101-000000-2"}


def test_what_a_killed_start_leaves_is_no_run_and_the_next_start_removes_it(
    tmp_path, monkeypatch, data, run
):
    monkeypatch.chdir(tmp_path)
    names = (".alive.0123abcd.new", ".killed.4567abcd.new", ".stranger.new", ".mine")
    alive, killed, stranger, mine = (tmp_path / "runs" / name for name in names)
    for folder in (alive, killed, stranger, mine):
        (folder / "data").mkdir(parents=True)
        (folder / "settings.json").write_text((run / "settings.json").read_text())
    for folder in (alive, killed, stranger):
        folder.with_suffix(".lock").touch()
    with pytest.raises(InputError, match="no run there yet"):
        cli.newest_run()
    process = another_process_holds(alive.with_suffix(".lock"))
    prepared = f"a training is being prepared: {os.path.join('runs', 'alive')}"
    assert entry(runs.main, "--csv") == (0, "", f"{prepared}\n")
    with pytest.raises(InputError, match="no run there yet; a training is being prepared"):
        cli.newest_run()
    assert entry(train.main, *OPTIONS, "--data", data, "--run", "runs/killed")[0] == 0
    process.kill()
    process.wait()
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    alive_or_foreign = {*names, ".alive.0123abcd.lock", ".stranger.lock"} - {killed.name}
    assert left == {*alive_or_foreign, "killed"}
    assert cli.newest_run().name == "killed"
    assert entry(train.main, "--run", "runs/killed", "--resume", "--max-steps", "3")[0] == 0
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {stranger.name, ".stranger.lock", mine.name, "killed"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_start_killed_at_any_call_leaves_nothing_to_the_next(tmp_path):
    """The process is killed before its first file operation, before its second, and so on."""

    def fill(folder):
        (folder / "data").mkdir()
        (folder / "settings.json").touch()

    def start(killed_at):
        calls = count(1)

        def counted(real, *arguments, **more):
            if next(calls) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        for name in ("open", "mkdir", "rename", "unlink", "write", "lstat"):
            setattr(os, name, partial(counted, getattr(os, name)))
        run_folder.make(runs / "run", runs / "run", fill)
        os._exit(0)

    statuses = []
    while 0 not in statuses:
        runs = tmp_path / f"{len(statuses)}/runs"
        child = os.fork()
        if child == 0:
            start(len(statuses) + 1)
        statuses.append(os.waitpid(child, 0)[1])
        complete = (runs / "run").exists()
        run_folder.make(runs / "next", runs / "next", fill)
        names = {"next", "run"} if complete else {"next"}
        assert {p.name for p in runs.iterdir()} == names
    assert len(statuses) > 8
    assert set(statuses) == {0, signal.SIGKILL}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("no text"), OSError(28, "full")])
def test_a_start_that_fails_leaves_nothing(tmp_path, error):
    def fail(folder):
        (folder / "half").touch()
        raise error

    wanted = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        run_folder.make(None, tmp_path / "runs/new", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_while_a_run_begins_is_kept(tmp_path):
    taken = tmp_path / "runs/new"

    def fill(folder):
        taken.mkdir(exist_ok=True)
        (taken / "mine").touch()

    with pytest.raises(InputError, match="already exists"):
        run_folder.make(taken, taken, fill)
    folder, _ = run_folder.make(None, taken, fill)
    assert folder == tmp_path / "runs/new-2"
    assert (taken / "mine").exists()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"new", "new-2"}


def test_a_signal_while_a_run_begins_leaves_nothing(tmp_path, data, monkeypatch):
    def stopped(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(new_run, "save_last", stopped)
    code, _, _ = entry(train.main, *OPTIONS, "--data", data, "--run", tmp_path / "runs/x")
    assert code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_announced_while_its_vocabulary_is_learnt(tmp_path, data, monkeypatch):
    learn, seen = new_run.train_tokenizer, []

    def watched(*arguments):
        seen.extend(run_lock.being_made(tmp_path / "runs"))
        return learn(*arguments)

    monkeypatch.setattr(new_run, "train_tokenizer", watched)
    code, out, _ = entry(train.main, *OPTIONS, "--data", data, "--run", tmp_path / "runs/a.b")
    assert code == 0
    assert seen == [tmp_path / "runs/a.b"]
    assert run_lock.being_made(tmp_path / "runs") == []
    assert "choosing the entries of the vocabulary" in out.splitlines()


def test_the_tokens_on_disk_have_hashes(run, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    tokens = copy / "data/train.tokens"
    content = bytearray(tokens.read_bytes())
    content[10] ^= 1  # another token of the vocabulary
    tokens.write_bytes(content)
    code, _, errors = entry(train.main, "--run", copy, "--resume", "--max-steps", "9")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{tokens}: damaged or exchanged" in errors


def test_a_new_start_after_a_restart_of_the_launcher_goes_on(tmp_path, data, monkeypatch):
    """Under torchrun --max-restarts the same command line comes again; it is the same run."""
    from ysnake.training import launch

    monkeypatch.chdir(tmp_path)
    argv = [*map(str, OPTIONS), "--data", str(data)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run = tmp_path / "runs/mine"
    assert entry(train.main, *argv, "--run", run)[0] == 0
    assert launch.resumed_after_restart(argv) == argv
    named = [*argv, "--run", str(run)]
    resumed = [*named, "--resume", "--run", str(run)]
    assert launch.resumed_after_restart(named) == resumed  # a change of machines counts no restart
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launch.resumed_after_restart(named) == resumed
    assert launch.resumed_after_restart(argv)[-3:] == [
        "--resume",
        "--run",
        os.path.join("runs", "mine"),
    ]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert launch.resumed_after_restart(argv) == argv
    assert launch.resumed_after_restart(named) == named
    assert json.loads((run / "settings.json").read_text())["resume"] is False


@pytest.mark.parametrize(("processes", "place"), [(1, "cuda"), (2, "cpu")])
def test_a_run_of_several_processes_begins_without_a_gpu(
    tmp_path, data, monkeypatch, processes, place
):
    """Each process reads its part later. So a model that no GPU can hold can be trained."""
    seen = []

    def distribute(self, model, device):
        seen.append(device)
        return model.loss

    monkeypatch.setattr(cli, "pick_device", lambda name: "cuda")
    monkeypatch.setattr(parallel.Ranks, "distribute", distribute)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    argv = [*OPTIONS, "--data", str(data), "--run", str(tmp_path / "run")]
    new_run.start(settings.parse(argv), Console(quiet=True))
    assert set(seen) == {place}


def test_of_several_processes_none_keeps_the_whole_model(tmp_path, monkeypatch):
    class Started:
        pass

    def start(settings, console):
        run = Started()
        made.append(weakref.ref(run))
        return run

    made = []
    monkeypatch.setattr(open_run, "start", start)
    monkeypatch.setattr(open_run, "resume", lambda *_: "resumed")
    monkeypatch.setattr(parallel.Ranks, "on_first", lambda self, work: work())
    monkeypatch.setattr(parallel.Ranks, "from_first", lambda self, value: value)
    of_a_run = settings.Settings(run=tmp_path)
    with open_run.open_run(of_a_run, parallel.Ranks(0, 2), Console(quiet=True)) as run:
        assert run == "resumed"
        assert made[0]() is None
    with open_run.open_run(of_a_run, parallel.Ranks(), Console(quiet=True)) as run:
        assert run is made[1]()
