"""Disks that fill up, folders that are read-only, files that are damaged: named, and nothing lost.

Each test begins with the same small run of six steps, of which last/ is the sixth and last.old/ the
fifth.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small import TINY, corpus, entry, model

from ysnake import evaluate, export, run, serve, train
from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.text import tokenizer
from ysnake.training import memory, resume, settings
from ysnake.training.parallel import Ranks

OPTIONS = [*TINY, "--vocab-size", "300", "--threads", "1", "--max-steps", "6"]
OPTIONS += ["--eval-every", "6", "--checkpoint-every", "1"]


def fit(data, folder):
    return entry(train.main, *OPTIONS, "--data", data, "--run", folder)


def go_on(folder):
    return entry(train.main, "--run", folder, "--resume")


def result(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train_loss"], line.get("val_loss")) for line in lines]
    return losses, (folder / "last/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert fit(data, folder)[0] == 0
    return folder


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "run")


# ------------------------------------------------------------------ damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_model(path):
    checkpoint.save(path.parent.with_name("other"), model(d_model=64))
    shutil.copy(path.parent.with_name("other") / path.name, path)


def another_tokenizer(path):
    tokenizer.save(tokenizer.train("bpe", ["quite other words " * 9], 300), path.parent)


DAMAGE = {
    ("model.safetensors", truncate): "damaged (",
    ("model.safetensors", flip): "damaged or exchanged",
    ("model.safetensors", os.unlink): "no such file",
    ("config.json", another_model): "damaged or exchanged",
    ("config.json", empty): "not JSON",
    ("config.json", os.unlink): "no such file",
    ("tokenizer.json", empty): "not a tokenizer",
    ("tokenizer.json", another_tokenizer): "damaged or exchanged",
    ("manifest.json", truncate): "not JSON",
    ("training_state.pt", flip): "damaged or exchanged",
    ("training_state.pt", truncate): "damaged or exchanged",
    ("training_state.pt", os.unlink): "no such file, so training cannot be resumed",
}


def shown(value):
    return value if isinstance(value, str) else f"{value[0]}, {value[1].__name__.strip('<>')}"


@pytest.mark.parametrize(("where", "message"), DAMAGE.items(), ids=shown)
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, caplog, where, message):
    name, damage = where
    damage(folder / "last" / name)
    message = f"{folder / 'last' / name}: {message}"
    if name != "training_state.pt":  # which completing does not read
        used, _, _ = checkpoint.load_all(folder)
        assert used == folder / "last.old"
        assert message in caplog.text
    caplog.clear()
    options = replace(settings.read(folder), resume=True)
    again = resume.resume(options, Ranks(), Console(quiet=True))
    assert again.progress.step == 5
    assert message in caplog.text
    assert f"continues from {folder / 'last.old'}" in caplog.text
    assert {path.name for path in folder.glob("last*")} == {"last", "last.damaged"}


def test_resuming_from_the_older_checkpoint_ends_with_the_same_weights(folder, whole, caplog):
    truncate(folder / "last/model.safetensors")
    code, out, _ = entry(run.main, folder, "--prompt", "The boa", "--max-tokens", "2")
    assert (code, out != "") == (0, True)
    assert go_on(folder)[0] == 0
    assert result(folder) == result(whole)


def test_where_both_are_damaged_the_newer_is_named(folder):
    flip(folder / "last/model.safetensors")
    truncate(folder / "last.old/tokenizer.json")
    before = sorted(folder.rglob("*"))
    for command, options in {
        run.main: ("--prompt", "x"),
        evaluate.main: ("--data", folder / "settings.json"),
        export.main: ("--gguf", folder / "x.gguf"),
        serve.main: ("--port", "0"),
    }.items():
        if command is evaluate.main:
            (folder.parent / "a.txt").write_text("text")
            options = ("--data", folder.parent / "a.txt")
        code, _, errors = entry(command, folder, *options)
        assert (code, errors.count("\n")) == (2, 1)
        assert f"{folder / 'last/model.safetensors'}: damaged or exchanged" in errors
    code, _, errors = go_on(folder)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{folder / 'last/model.safetensors'}: damaged or exchanged" in errors
    assert sorted(folder.rglob("*")) == before


def without_hashes(write):
    """Damage to the tokens of a run that was begun before these had hashes."""

    def damage(path):
        (path.parent / "manifest.json").unlink()
        write(path)

    return damage


def with_factors(path):
    """Settings of a run whose head has two factors."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_size": 16}))


OUTSIDE = {
    ("data/train.tokens", flip): "damaged or exchanged",
    ("data/train.tokens", os.unlink): "no such file",
    ("data/train.tokens", without_hashes(lambda path: os.truncate(path, 200))): (
        "damaged, the run began with"
    ),
    ("data/val.tokens", without_hashes(lambda path: path.write_bytes(b"x"))): (
        "damaged, it ends within a token"
    ),
    (
        "data/train.tokens",
        without_hashes(lambda path: path.write_bytes(b"\xff" * path.stat().st_size)),
    ): "damaged, token 65535 of 300",
    ("settings.json", empty): "not JSON",
    ("settings.json", lambda path: path.write_text("[]")): "not the settings of a run",
    ("settings.json", lambda path: path.write_text('{"data": 3}')): "not the settings of a run",
    ("settings.json", with_factors): "not the settings of this run (output_size is 16",
    ("metrics.jsonl", lambda path: path.write_text("no\n")): "line 1: not the metrics of a step",
}


@pytest.mark.parametrize(("where", "message"), OUTSIDE.items(), ids=shown)
def test_what_else_a_run_needs_is_named(folder, where, message):
    name, damage = where
    shutil.rmtree(folder / "last")  # so that there is a step to do
    damage(folder / name)
    code, _, errors = go_on(folder)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(folder / name) in errors
    assert message in errors


def test_a_run_of_another_shape_is_not_resumed(folder):
    """last/ of another run in the place of this one's, whole as it is."""
    checkpoint.save(folder / "last", model(), None, {"progress": {"step": 1}})
    shutil.rmtree(folder / "last.old")
    code, _, errors = go_on(folder)
    assert (code, errors.count("\n")) == (2, 1)
    assert "tokenizer.json: no such file" in errors
    learnt = checkpoint.load_tokenizer(folder / "best")
    checkpoint.save(folder / "last", model(), learnt, {"progress": {"steps": 1}, "head": {}})
    shutil.rmtree(folder / "last.old")
    code, _, errors = go_on(folder)
    assert (code, errors.count("\n")) == (2, 1)
    assert "training_state.pt: not the state of this training run" in errors


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (torch.AcceleratorError("CUDA error: the device is busy"), None),
    ],
)
def test_what_the_device_cannot_do_is_no_damage(folder, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(Ranks, "distribute", fail)
    if said is None:
        with pytest.raises(torch.AcceleratorError):
            go_on(folder)
    else:
        code, _, errors = go_on(folder)
        assert (code, errors.count("\n")) == (1, 1)
        assert errors.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("changed", "bytes_here", "said"),
    [
        ({"max_steps": 2}, 1e12, "--max-steps: the run has trained 6 steps"),
        ({}, 1e6, "--batch-size: a batch with 4 windows"),
    ],
)
def test_all_processes_together_refuse_to_resume(folder, monkeypatch, changed, bytes_here, said):
    """Then the error is printed once."""
    agreed = []

    class Several(Ranks):
        def on_all(self, work):
            try:
                return work()
            except InputError as error:
                agreed.append(str(error))
                raise

    monkeypatch.setattr(memory, "available", lambda: bytes_here)
    options = replace(settings.read(folder), resume=True, **changed)
    with pytest.raises(InputError):
        resume.resume(options, Several(), Console(quiet=True))
    assert said in "".join(agreed)


# ------------------------------------------------------------------ disks


def test_a_file_that_cannot_grow_ends_the_run_and_it_resumes(tmp_path, whole, data):
    """Files are limited to less than training_state.pt, the largest file, needs."""
    resource = pytest.importorskip("resource", reason="Windows has no limit to a file's size")
    size = (whole / "last/training_state.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, before[1]))  # the first one is smaller
    try:
        code, _, errors = fit(data, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"{folder / 'last.new/training_state.pt'}: cannot be written (File too large)" in errors
    checkpoint.load(folder / "last")
    assert not (folder / "last.new").exists()
    assert go_on(folder)[0] == 0
    assert result(folder) == result(whole)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own; yields its folder and what mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, folder], capture_output=True).returncode == 0

    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        pytest.skip("only who may mount can make a small disk")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("part", [2.1, 0.2], ids=["at a save", "at the start"])
def test_a_disk_that_fills_up_ends_the_run_and_it_resumes(disk, whole, data, part):
    """The disk has room for 2.1 checkpoints, so a save fails, or for 0.2, so the start fails."""
    folder, remount = disk
    size = sum(path.stat().st_size for path in (whole / "last").iterdir())
    assert remount(f"size={int(size * part)}")
    code, _, errors = fit(data, folder / "run")
    assert (code, errors.count("\n")) == (2, 1)
    assert "No space left on device; free some space there" in errors
    assert str(folder) in errors
    assert remount("size=64m")
    if part < 1:
        assert list(folder.iterdir()) == []
        assert fit(data, folder / "run")[0] == 0
    else:
        checkpoint.load(folder / "run/last")
        assert go_on(folder / "run")[0] == 0
    assert result(folder / "run") == result(whole)


def test_a_read_only_folder_is_read_and_named_where_it_is_written(disk, whole, data, tmp_path):
    folder, remount = disk
    assert remount("size=64m")
    shutil.copytree(whole, folder / "run")
    shutil.rmtree(folder / "run/last")
    assert remount("ro")
    code, out, _ = entry(run.main, folder / "run", "--prompt", "The boa", "--max-tokens", "2")
    assert (code, out != "") == (0, True)
    for command, options in {
        "resume": (train.main, "--run", folder / "run", "--resume"),
        "train": (train.main, *OPTIONS, "--data", data, "--run", folder / "new"),
        "export": (export.main, folder / "run", "--gguf", folder / "x.gguf"),
        "save state": (run.main, folder / "run", "--prompt", "x", "--save-state", folder / "x"),
    }.items():
        main, *arguments = options
        code, _, errors = entry(main, *arguments)
        assert (code, errors.count("\n")) == (2, 1), command
        assert "Read-only file system" in errors
        assert str(folder) in errors
    with pytest.raises(InputError, match=r"x\.new: cannot be written \(Read-only file system\)"):
        checkpoint.save(folder / "x", model())
