"""Progress of long work in a terminal, in a log and in a notebook, and what metrics.jsonl says."""

import io
import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small import ROOT, corpus, entry

import ysnake
from ysnake import evaluate, runs
from ysnake.shared import progress
from ysnake.text.tokenizer import decode

SIZES = {"d_model": 32, "n_layers": 2, "d_state": 8, "head_dim": 8, "seq_len": 24, "batch_size": 4}
SIZES |= {"vocab_size": 300}
OLD = ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "skipped")


@pytest.fixture
def here(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_metrics_say(here, capsys):
    began = time.time()
    run = ysnake.train("snakes.txt", run="run", max_steps=3, eval_every=2, **SIZES)
    assert "step 1 of 3" not in capsys.readouterr().out  # a line every half minute
    lines = run.metrics
    assert [line["epoch"] for line in lines] == sorted(line["epoch"] for line in lines)
    assert all(began <= line["wall_time"] <= time.time() for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert all(1e7 < line["peak_memory"] < 1e11 for line in lines)
    assert not any("resumed" in line for line in lines)
    bits_per_byte_count_the_bytes_of_the_held_out_text(run, lines[-1])


def bits_per_byte_count_the_bytes_of_the_held_out_text(run, line):
    tokenizer = run.load("last").tokenizer
    ids = np.fromfile(run.path / "data/val.tokens", "<u2").tolist()
    starts = sum(a == b == 0 for a, b in pairwise(ids))
    n_targets = len(ids) - 1 - starts  # the first token has none before it; no target crosses
    size = len(decode(tokenizer, ids).encode())
    assert line["bits_per_byte"] == pytest.approx(
        line["val_loss"] * n_targets / math.log(2) / size, rel=1e-6
    )
    tokens = (run.path / "data/train.tokens").stat().st_size // 2
    assert line["epoch"] == round(line["tokens"] / tokens, 4)


def test_a_run_is_marked_where_it_was_resumed_and_older_runs_are_read(here, capsys):
    run = ysnake.train("snakes.txt", run="runs/old", max_steps=2, quiet=True, **SIZES)
    old = [{k: v for k, v in line.items() if k in OLD} for line in run.metrics]
    Path("runs/old/metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in old))
    assert runs.main([]) == 0
    again = ysnake.train(run=run.path, resume=True, max_steps=4, quiet=True)
    assert [line.get("resumed") for line in again.metrics] == [None, None, True, None]
    assert again.metrics[:2] == old
    assert (run.path / "loss.png").exists()


def test_a_log_gets_lines_with_speed_and_time_left(here, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    run = ysnake.train("snakes.txt", max_steps=3, **SIZES)
    out = capsys.readouterr().out
    assert "step 2 of 3: loss " in out
    line = next(line for line in out.splitlines() if line.startswith("step 2 of 3"))
    assert line.count(" tokens/s") == 1
    assert line.endswith(" left")
    assert "reading for the vocabulary: 6%, 0.0 million characters" in out
    assert "evaluating 100%" in out
    chosen = ["--data", "snakes.txt", "--checkpoint", "best"]
    code, out, _ = entry(evaluate.main, run.path, *chosen)
    assert code == 0
    assert out.splitlines()[-1].startswith(f"{run.path / 'best'}: ")
    assert " million characters" in out
    assert "nats per token" in out.splitlines()[-1]


def test_a_terminal_gets_a_bar_that_vanishes():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with progress.progress(console) as show:
        show(None, "counting")
        console.print("a sample")
        show(0.25, "step 1 [of] 4")
    assert "step 1 [of] 4" in out.getvalue()
    assert "a sample" in out.getvalue()


def test_a_bar_without_a_fraction_pulses():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=100)

    def colors():
        return set(re.findall(r"38;2;\d+;\d+;\d+", out.getvalue()))

    with progress.progress(console) as show:
        show(0.25, "reading")
    assert len(colors()) < 4
    with progress.progress(console) as show:
        show(0.25, "reading")
        show(None, "choosing")
    assert len(colors()) > 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (121, "2 min"), (5900, "98 min"), (11_100, "3 h 05 min")],
)
def test_durations(seconds, said):
    assert progress.duration(seconds) == said


IN_A_NOTEBOOK = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from ysnake.shared import cli
from ysnake.shared.progress import progress
console = cli.console()
with progress(console) as show:
    show(0.5, "step <1>")
    console.print("[bold]a sample[/]")
"""


def test_a_notebook_gets_a_bar(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipykernel")
    cell = nbformat.v4.new_code_cell(IN_A_NOTEBOOK)
    bars = []

    class Watched(client):
        def process_message(self, message, cell, index):
            if message["msg_type"] in ("display_data", "update_display_data"):
                bars.append(message["content"]["data"].get("text/html", ""))
            return super().process_message(message, cell, index)

    Watched(nbformat.v4.new_notebook(cells=[cell]), timeout=120).execute(cwd=str(tmp_path))
    assert '<progress max="1" value="0.5000"></progress> step &lt;1&gt;' in bars
    assert any("a sample" in bar for bar in bars)
    assert bars[-1] == ""  # the bar vanishes


def test_samples_after_the_last_checkpoint_are_written_once(here):
    sizes = {"quiet": True, "eval_every": 1, "threads": 1, **SIZES}
    whole = ysnake.train("snakes.txt", run="runs/whole", max_steps=2, **sizes)
    run = ysnake.train("snakes.txt", run="runs/killed", max_steps=1, **sizes)
    samples = run.path / "samples.txt"
    with samples.open("a") as file:  # as a process killed between a sample and its checkpoint
        file.write("step 2: loss 5.7\nThe adder >>> is")
    ysnake.train(run=run.path, resume=True, max_steps=2, quiet=True)
    assert samples.read_text() == (whole.path / "samples.txt").read_text()
