"""`ysnake.train(...)`: a call, a command and a module with one name, and the run it returns."""

import json
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small import corpus, environment, python

import ysnake
from ysnake.model.config import PRESETS
from ysnake.shared.errors import InputError
from ysnake.training import settings, speed, step

TINY = {"d_model": 32, "n_layers": 2, "d_state": 8, "head_dim": 8, "seq_len": 24, "batch_size": 4}
TINY |= {"vocab_size": 300}


@pytest.fixture
def here(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_from_python_is_a_run_from_the_command_line(here, capsys):
    run = ysnake.train("snakes.txt", run="runs/mine", max_steps=4, eval_every=2, quiet=True, **TINY)
    assert capsys.readouterr().out == ""
    assert (run.path, run.ended) == (Path("runs/mine"), "steps")
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert run.metrics == lines
    assert run.losses == {line["step"]: line["train_loss"] for line in lines}
    assert list(run.held_out_losses) == [2, 4]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    argv = ["--data", "snakes.txt", "--run", "runs/other", "--max-steps=4", "--eval-every=2"]
    assert ysnake.train.main([*argv, *options]) == 0
    first, second = (
        (Path("runs") / name / "last/model.safetensors").read_bytes() for name in ("mine", "other")
    )
    assert first == second
    text = run.load("last").generate("The adder", 5, temperature=0)
    assert text == ysnake.load("runs/other").generate("The adder", 5, temperature=0)


def test_the_threads_and_random_numbers_of_the_program_stay_as_they_were(here, monkeypatch):
    monkeypatch.setattr(speed, "MEASURED_SECONDS", 0.1)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    other = 1 if threads > 1 else 2
    options = {"max_steps": 1, "threads": other, "quiet": True, **TINY}
    run = ysnake.train("snakes.txt", run="runs/mine", **options)
    assert json.loads((run.path / "last/progress.json").read_text())["threads"] == other
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    run = ysnake.train("snakes.txt", run="runs/size", size="3M", output_size=8, **options)
    ysnake.train(run=run.path, resume=True, max_steps=2, quiet=True)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(InputError):
        ysnake.train("snakes.txt", run="runs/mine", **options)  # the run exists
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("settings", ["no_grad", "inference_mode", "autocast", "float64"])
def test_a_program_s_settings_of_torch_change_nothing(here, settings):
    options = {"max_steps": 2, "quiet": True, "precision": "float32", **TINY}
    usual = ysnake.train("snakes.txt", run="runs/usual", **options)
    dtype = torch.float64 if settings == "float64" else torch.float32
    blocks = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    try:
        torch.set_default_dtype(dtype)
        with blocks.get(settings, nullcontext)():
            run = ysnake.train("snakes.txt", run="runs/mine", **options)
            assert torch.get_default_dtype() == (
                torch.float64 if settings == "float64" else torch.float32
            )
    finally:
        torch.set_default_dtype(torch.float32)
    first, second = ((each.path / "last/model.safetensors").read_bytes() for each in (usual, run))
    assert first == second


def test_a_stopped_run_is_returned_and_can_be_resumed(here, monkeypatch):
    real, calls = step.batch_loss, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(step, "batch_loss", stopping)
    run = ysnake.train(["snakes.txt"], max_steps=5, quiet=True, **TINY)
    assert (run.ended, len(run.losses)) == ("interrupted", 3)
    again = ysnake.train(run=run.path, resume=True, quiet=True)
    assert (again.path, again.ended, len(again.losses)) == (run.path, "steps", 5)


def test_it_trains_in_another_thread(here):
    ended = []

    def work():
        ended.append(ysnake.train("snakes.txt", max_steps=1, quiet=True, **TINY).ended)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == ["steps"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 1, "step": 2}, "ysnake.train: unknown settings: epochs, step"),
        ({"lr": "fast"}, "ysnake.train: lr: expected a number, got 'fast'"),
        ({"data": 3}, "ysnake.train: data: expected a list of paths, got"),
        ({"lr": -1.0}, "lr: expected at least 0"),
        ({"max_steps": -1}, "max_steps: expected at least 1"),
        ({"preset": "huge"}, "preset: expected one of"),
        ({"stop_at_loss": -1.0, "max_steps": 9}, "stop_at_loss: expected at least 0"),
        ({"accumulate": 2**20}, "accumulate, batch_size, seq_len: expected at most"),
        ({"device": "cuda:99", "data": "snakes.txt"}, "device: cuda:99 is not available here"),
        ({"vocab_size": 9, "data": "snakes.txt"}, "vocab_size: a bpe tokenizer needs at least"),
        ({"plan": True}, "ysnake train --plan"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings(here, wrong, said):
    with pytest.raises(InputError) as error:
        ysnake.train(**wrong)
    assert said in str(error.value)
    assert said.endswith("--plan") or "--" not in str(error.value).replace("train --help", "")
    assert not Path("runs").exists()


def test_the_name_is_a_module_and_a_command_too(here):
    code = """
import sys, ysnake
assert not {"torch", "tyro"} & set(sys.modules)
assert callable(ysnake.train) and ysnake.train.__name__ == "ysnake.train"
from ysnake.train import main
import ysnake.train as module
assert main is module.main is ysnake.train.main
assert ysnake.train is module and callable(module)
assert "torch" not in sys.modules
import inspect
assert list(inspect.signature(ysnake.train).parameters)[:2] == ["data", "preset"]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert python("ysnake.train", "--max-steps", "0", cwd=here).returncode == 2


# A file of settings

FILE = """
data = "snakes.txt"
preset = "ys-24m"
seq-len = 99
batch_size = 3
carry-state = true
stop-at-loss = 2
"""


def test_a_file_of_settings_and_options_that_win_over_it(here):
    Path("run.toml").write_text(FILE)
    read = settings.parse(["--config", "run.toml", "--batch-size", "5", "--carry-state"])
    assert (read.data, read.preset, read.seq_len) == ((Path("snakes.txt"),), "ys-24m", 99)
    assert (read.batch_size, read.carry_state, read.stop_at_loss) == (5, True, 2)
    assert read.d_model == PRESETS["ys-24m"].settings["d_model"]
    assert read.max_documents is None  # the limit of a preset is not for the user's data
    assert settings.parse(["--config", "run.toml", "--preset", "quick"]).d_model == 256
    assert settings.parse(["--config", "run.toml", "--no-carry-state"]).carry_state is False
    same = settings.from_values({"config": "run.toml", "batch-size": 5})
    assert (same.batch_size, same.seq_len, same.preset) == (5, 99, "ys-24m")


def test_the_settings_of_a_run_make_the_same_run(here):
    first = ysnake.train("snakes.txt", run="first", max_steps=2, init="uniform", quiet=True, **TINY)
    options = ["--config", "first/settings.json", "--run", "second"]
    assert ysnake.train.main(options) == 0
    for file in ("settings.json", "last/model.safetensors"):
        assert Path("second", file).read_bytes() == (first.path / file).read_bytes()
    assert settings.parse([*options, "--resume"]).run == Path("second")
    Path("other.toml").write_text("seed = 9")
    with pytest.raises(
        InputError, match="--seed: cannot change in a resumed run, which has 0; got 9"
    ):
        settings.parse(["--config", "other.toml", "--run", "second", "--resume"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed = 1\nepochs = 2", "unknown settings: epochs, speed;"),
        ("learning-rate = -2", "--lr: expected at least 0, got -2"),
        ("batchsize = 4", "unknown settings: batchsize; did you mean batch_size?"),
        ("lr = 'fast'", "f.toml: lr: expected a number, got 'fast'"),
        ("data = [1]", "f.toml: data: expected a list of paths"),
        ("[train]\nlr = 1", "unknown settings: train;"),
        ("config = 'g.toml'", "cannot name another"),
        ("lr = ", "f.toml: not TOML"),
        ("lr = -1", "--lr: expected at least 0, got -1"),
        ("tokenizer = 'byte'", "tokenizer: expected one of bpe, word"),
        (b"\xff", "byte 0 is not UTF-8"),
        (None, "--config: f.toml: No such file"),
    ],
)
def test_a_wrong_file_is_one_line(here, text, said):
    if text is not None:
        Path("f.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        settings.parse(["--config", "f.toml"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
