"""`--log`: the metrics of a run in TensorBoard, Weights & Biases and Trackio."""

import importlib.util
import json

import pytest
from small import corpus

import ysnake
from ysnake.shared.errors import InputError
from ysnake.training import tool_log

HOW = {"d_model": 32, "n_layers": 2, "d_state": 8, "head_dim": 8, "seq_len": 24, "batch_size": 4}
HOW |= {"vocab_size": 300, "eval_every": 2, "quiet": True}


@pytest.fixture
def here(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tensorboard_has_what_the_metrics_say_also_after_a_resume(here):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = ysnake.train("snakes.txt", run="run", log="tensorboard", max_steps=3, **HOW)
    ysnake.train(run=run.path, resume=True, max_steps=5, quiet=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("train_loss", "val_loss", "bits_per_byte", "lr", "seconds"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        said = {line["step"]: line[name] for line in run.metrics if line.get(name) is not None}
        assert logged == pytest.approx(said, rel=1e-5)
    assert [event.step for event in events.Scalars("resumed")] == [4]


def test_wandb_without_an_account(here, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = ysnake.train("snakes.txt", run="run", log="wandb", max_steps=2, **HOW)
    assert len(run.losses) == 2
    (file,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    name = (run.path / tool_log.WANDB_ID).read_text().strip()
    assert name in file.name
    assert b"val_loss" in file.read_bytes()


def test_trackio(here, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", here / "trackio")
    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", here / "trackio")
    run = ysnake.train("snakes.txt", run="run", log="trackio", max_steps=2, **HOW)
    logged = sqlite_storage.SQLiteStorage.get_logs("ysnake", "run")
    assert [line["train_loss"] for line in logged] == list(run.losses.values())


def test_a_tool_that_is_missing_is_named_before_anything_begins(here, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = lambda name, *more: None if name == "wandb" else find_spec(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(InputError, match=r"log: wandb is not installed: .*\[wandb\]"):
        ysnake.train("snakes.txt", run="run", log="wandb", max_steps=2, **HOW)
    assert not (here / "run").exists()
    with pytest.raises(InputError, match="log: expected one of tensorboard, wandb, trackio"):
        ysnake.train("snakes.txt", log="mlflow")


def test_a_tool_that_fails_ends_no_training(here, monkeypatch, capsys):
    def failing(run):
        def write(values, step):
            if step == 2:
                raise OSError("the disk [is] full")
            written.append(json.dumps(values))

        return write, lambda: written.append("closed")

    written = []
    monkeypatch.setitem(tool_log.TOOLS, "tensorboard", failing)
    monkeypatch.setattr(tool_log, "check", lambda settings: None)
    how = HOW | {"quiet": False}
    run = ysnake.train("snakes.txt", log="tensorboard", max_steps=4, **how)
    assert (len(run.losses), len(written)) == (4, 1)
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed") == 1
    assert "OSError: the disk [is] full" in said

    def refusing(run):
        raise RuntimeError("no account\nsecond line")

    monkeypatch.setitem(tool_log.TOOLS, "tensorboard", refusing)
    with pytest.raises(InputError, match=r"log: tensorboard cannot be used \(.*no account\)"):
        ysnake.train(run=run.path, resume=True, max_steps=5, quiet=True)
