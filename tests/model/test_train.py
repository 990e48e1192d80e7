"""Training from the command line: it learns, and stops for each reason."""

import hashlib
import json
import re
from itertools import count

import pytest
import torch
from rich.console import Console
from small import ROOT, TINY, corpus, python

from ysnake import train
from ysnake.checkpoints import checkpoint
from ysnake.inference import score
from ysnake.inference.decoding import Decoder
from ysnake.model.config import PRESETS
from ysnake.shared import run_files
from ysnake.text import data
from ysnake.training import evaluation, loop, new_run, settings, step, stopping
from ysnake.training import run as training_run
from ysnake.training.metrics import OF_THIS_EXECUTION
from ysnake.training.optimizer import make_optimizer
from ysnake.training.signals import Stop

pytestmark = pytest.mark.usefixtures("one_thread")
COMMAND = ["ysnake.train", *TINY, "--vocab-size", "300", "--threads", "1", "--data", "snakes.txt"]


def fit(folder, *options):
    """Train in this process; returns the run folder."""
    run = folder / f"run{len(list(folder.iterdir()))}"
    data = folder / "snakes.txt"
    if not data.exists():
        corpus(folder)
    argv = [*COMMAND[1:-1], str(data), "--run", str(run), *map(str, options)]
    train.main(argv)
    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, which="last"):
    return (run / which / "model.safetensors").read_bytes()


def same_training(first, second):
    """Whether weights, samples and metrics of two runs are equal, apart from times."""
    a, b = (
        [{k: v for k, v in m.items() if k not in OF_THIS_EXECUTION} for m in metrics(r)]
        for r in (first, second)
    )
    samples = [(run / "samples.txt").read_bytes() for run in (first, second)]
    return weights(first) == weights(second) and a == b and samples[0] == samples[1]


def test_a_run_leaves_what_it_promises(tmp_path):
    run = fit(tmp_path, "--max-steps", 6, "--eval-every", 3)
    hugging_face = {"config.json", "generation_config.json", "model.safetensors"}
    hugging_face |= {"tokenizer.json", "tokenizer_config.json", "manifest.json"}
    assert {p.name for p in run.iterdir()} == {
        *("settings.json", "metrics.jsonl", "loss.png", "samples.txt", "best", "last", "data"),
        *("best.old", "last.old"),
    }
    assert {p.name for p in (run / "best").iterdir()} == hugging_face
    assert {p.name for p in (run / "last").iterdir()} - hugging_face == {
        *("training_state.pt", "progress.json")
    }
    lines = metrics(run)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 4 * 24
    assert all(m["skipped"] == 0 and m["tokens_per_s"] > 0 for m in lines)
    assert [m["step"] for m in lines if "val_loss" in m] == [3, 6]
    assert json.loads((run / "last/progress.json").read_text())["ended"] == "steps"
    assert json.loads((run / "settings.json").read_text())["d_model"] == 32
    assert (run / "samples.txt").read_text().count(" >>> ") == 2
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(
    ("lr", "batch_size"),
    [
        *((1e-2, size) for size in (1, 2, 64)),
        *(pytest.param(1e-3, size, marks=pytest.mark.slow) for size in (1, 2, 64)),
    ],
)
def test_no_step_is_skipped_at_any_batch_size(tmp_path, batch_size, lr):
    options = ("--batch-size", batch_size, "--lr", lr, "--seq-len", 6, "--warmup-steps", 10)
    run = fit(tmp_path, "--max-steps", 90, "--eval-every", 1000, *options)
    losses = [m["train_loss"] for m in metrics(run)]
    assert metrics(run)[-1]["skipped"] == 0
    assert sum(losses[-30:]) < sum(losses[:30])
    model = checkpoint.load(run / "last")
    assert all(p.isfinite().all() for p in model.parameters())


def test_it_stops_at_a_loss(tmp_path):
    run = fit(tmp_path, "--max-steps", 500, "--stop-at-loss", 3.5, "--lr", 0.01)
    losses = [m["train_loss"] for m in metrics(run)]
    assert len(losses) < 500
    assert sum(losses[-50:]) / 50 <= 3.5 < sum(losses[-51:-1]) / 50
    assert run_files.state(run) == "target loss reached"
    stored = run / "settings.json"
    text = stored.read_text()
    for target in ("3.0", "null"):  # as the settings of a resumed run that was killed
        stored.write_text(text.replace('"stop_at_loss": 3.5', f'"stop_at_loss": {target}'))
        assert run_files.state(run) == "can be resumed"


@pytest.mark.usefixtures("short_samples")
def test_it_stops_when_the_held_out_loss_gets_no_better(tmp_path):
    run = fit(tmp_path, "--max-steps", 400, "--patience", 2, "--eval-every", 8, "--lr", 0.1)
    val = [m["val_loss"] for m in metrics(run) if "val_loss" in m]
    assert len(metrics(run)) < 400
    assert min(val[-2:]) >= min(val[:-2])
    assert checkpoint.resolve(run).name == "best"


def test_it_stops_on_time_and_the_rate_follows_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.time, "perf_counter", count(0, 0.05).__next__)  # 0.05 s a step
    run = fit(tmp_path, "--max-minutes", 0.05, "--warmup-steps", 0, "--eval-every", 10**6)
    rates = [m["lr"] for m in metrics(run)]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == pytest.approx(60, abs=2)
    assert rates[-1] < 0.2 * rates[0]
    assert json.loads((run / "last/progress.json").read_text())["ended"] == "time"


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize(("seconds", "drawn"), [(1.0, [1, 6]), (0.0, [1, 2, 3, 4, 5, 6, 7])])
def test_drawing_and_saving_count_as_training_and_slow_drawing_is_rare(
    tmp_path, monkeypatch, seconds, drawn
):
    """On a clock that only drawing and saving advance. A save takes a second."""
    now, found, save = 0.0, [], loop.save_last

    def draw(folder, console):
        nonlocal now
        now += seconds
        found.append(len((folder / "metrics.jsonl").read_text().splitlines()))

    def slow_save(run):
        nonlocal now
        now += 1.0
        save(run)

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    monkeypatch.setattr(loop, "draw_loss", draw)
    monkeypatch.setattr(loop, "save_last", slow_save)
    often = ("--eval-every", 1, "--checkpoint-every", 1)
    run = fit(tmp_path, "--max-minutes", 0.1, "--max-steps", 50, *often)
    assert json.loads((run / "last/progress.json").read_text())["ended"] == "time"
    assert found == drawn


def test_learning_rate():
    options = settings.Settings(lr=1.0, warmup_steps=10, max_steps=100)
    rate = [step.learning_rate(options, training_run.Progress(step=s)) for s in range(101)]
    assert rate[0] == pytest.approx(0.1)
    assert max(rate) == pytest.approx(rate[9], rel=0.02)
    assert rate[100] == pytest.approx(0.1)
    assert rate[55] == pytest.approx(
        0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(0.55 * torch.pi)))
    )
    options.schedule = "linear"
    rate = [step.learning_rate(options, training_run.Progress(step=s)) for s in (4, 55, 100)]
    assert rate == pytest.approx([0.5 * 0.96, 0.45, 0])


@pytest.mark.usefixtures("short_samples")
def test_a_warm_up_that_does_not_end_is_a_warning(tmp_path, capsys):
    fit(tmp_path, "--max-steps", 1, "--warmup-steps", 1)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1
    assert "--max-steps 1 is not above --warmup-steps 1" in said
    assert step.warm_up_warning(settings.Settings(max_steps=2, warmup_steps=1)) is None
    assert step.warm_up_warning(settings.Settings(max_minutes=1.0)) is None


@pytest.mark.usefixtures("short_samples")
def test_accumulation_equals_a_larger_batch(tmp_path):
    one = fit(tmp_path, "--max-steps", 3, "--batch-size", 6)
    two = fit(tmp_path, "--max-steps", 3, "--batch-size", 2, "--accumulate", 3)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["tokens"] == b["tokens"]


def test_weights_that_decay_are_matrices(tmp_path):
    from small import model

    m = model()
    decaying, other = make_optimizer(m, 0.1).param_groups
    names = {id(p): name for name, p in m.named_parameters()}
    never = ("A_log", "D", "dt_bias", "norm.weight", "norm_f.weight", "bias")
    assert decaying["weight_decay"] == 0.1
    assert other["weight_decay"] == 0
    assert all(names[id(p)].endswith(never) for p in other["params"])
    assert not any(names[id(p)].endswith(never) for p in decaying["params"])


def test_a_run_that_is_done_stays_done_and_can_be_prolonged(tmp_path):
    run = fit(tmp_path, "--max-steps", 4)
    before = weights(run)
    assert train.main(["--run", str(run), "--resume"]) == 0
    assert weights(run) == before
    assert train.main(["--run", str(run), "--resume", "--max-steps", "6"]) == 0
    assert len(metrics(run)) == 6


def test_other_number_of_threads_warns(tmp_path, capsys):
    run = fit(tmp_path, "--max-steps", 2)
    train.main(["--run", str(run), "--resume", "--max-steps", "3", "--threads", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "started with 1 thread, continues with 2 threads" in said


def test_evaluations_do_not_depend_on_short_windows_and_batches(tmp_path):
    options = ("--max-steps", 1, "--lr", 0)
    wide = fit(tmp_path, *options, "--seq-len", 132, "--batch-size", 1)
    narrow = fit(tmp_path, *options, "--seq-len", 12, "--batch-size", 30)
    expected = metrics(wide)[-1]["val_loss"]
    assert expected is not None
    assert metrics(narrow)[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_dropped_characters_count_in_bits_per_byte_as_in_evaluate(tmp_path):
    text = tmp_path / "text.txt"  # each document has a character that no other one has
    texts = (f"An adder sleeps under a stone. {chr(0x4E00 + i) * 9} It wakes." for i in range(60))
    text.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    argv = [*COMMAND[1:-1], str(text), "--tokenizer", "word", "--vocab-size", "80", "--run"]
    run = new_run.start(settings.parse([*argv, str(tmp_path / "run")]), Console(quiet=True))
    argv = [*TINY, "--tokens-from", str(run.folder), "--run", str(tmp_path / "again")]
    again = new_run.start(settings.parse(argv), Console(quiet=True))
    parts = [part for part in data.split(data.open_corpus(run.settings).pieces()) if part.held_out]
    pieces = [(part.text, True) for part in parts]
    with torch.no_grad():
        total = score.score(Decoder(run.model), run.tokenizer, pieces, lambda n: None)
    assert total.dropped > 0.2 * total.bytes
    again.model.load_state_dict(run.model.state_dict())
    for each in (run, again):
        found = evaluation.held_out_loss(each, lambda said: None)
        assert found["val_loss"] == pytest.approx(total.loss_per_token, rel=1e-3)
        assert found["bits_per_byte"] == pytest.approx(total.bits_per_byte, rel=1e-3)


def with_old_best(last):
    """Change a checkpoint to one of an earlier version with a good best loss."""
    state = torch.load(last / checkpoint.STATE)
    del state["progress"]["best_loss"]
    state["progress"]["best_held_out_loss"] = 1e-3
    torch.save(state, last / checkpoint.STATE)
    (last / "manifest.json").unlink()


def best_loss(run):
    return torch.load(run / "last" / checkpoint.STATE)["progress"]["best_loss"]


def test_a_best_loss_of_an_earlier_version_does_not_count(tmp_path):
    run = fit(tmp_path, "--max-steps", 2)
    with_old_best(run / "last")
    best = (run / "best/model.safetensors").read_bytes()
    train.main(["--run", str(run), "--resume", "--max-steps", "3"])
    assert best_loss(run) == metrics(run)[-1]["val_loss"]
    assert (run / "best.earlier/model.safetensors").read_bytes() == best
    assert (run / "best/model.safetensors").read_bytes() != best


def test_a_best_loss_of_an_earlier_version_counts_if_its_windows_were_the_same(tmp_path):
    sizes = ("--seq-len", 256, "--batch-size", 1)
    run = fit(tmp_path, "--max-steps", 2, *sizes)
    with_old_best(run / "last")
    train.main(["--run", str(run), "--resume", "--max-steps", "3"])
    assert best_loss(run) == 1e-3
    assert not (run / "best.earlier").exists()


def test_an_evaluation_reads_no_more_than_it_promises(tmp_path, monkeypatch):
    argv = [*COMMAND[1:-1], str(corpus(tmp_path)), "--run", str(tmp_path / "run"), "--lr", "0"]
    options = settings.parse([*argv, "--seq-len", "24", "--batch-size", "3"])
    run = new_run.start(options, Console(quiet=True))
    expected = evaluation.held_out_loss(run, lambda said: None)["val_loss"]
    shapes, windows = [], step.windows
    monkeypatch.setattr(
        step, "windows", lambda run, batch: shapes.append(batch.ids.shape) or windows(run, batch)
    )
    run.settings.seq_len = 10**6
    assert evaluation.held_out_loss(run, lambda said: None)["val_loss"] == pytest.approx(expected)
    assert shapes == [(1, max(256, len(run.val)))]


def test_carried_state_is_the_state_of_the_text_before(tmp_path):
    """With a learning rate of 0, losses of carried windows are those of the whole text."""
    argv = [*COMMAND[1:-1], str(corpus(tmp_path)), "--run", str(tmp_path / "run"), "--carry-state"]
    options = settings.parse([*argv, "--seq-len", "7", "--batch-size", "3", "--lr", "0"])
    run = new_run.start(options, Console(quiet=True))
    from ysnake.text.data import IGNORED, consecutive_windows

    steps = 20
    windows = [consecutive_windows(run.train, 7, 3, i) for i in range(steps)]
    whole = consecutive_windows(run.train, 7 * steps, 3, 0)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            run.model(torch.from_numpy(whole.ids), torch.from_numpy(whole.seq_idx)).transpose(1, 2),
            torch.from_numpy(whole.targets),
            reduction="none",
        )
    for i, window in enumerate(windows):
        line = step.train_step(run, Stop())
        part = expected[:, 7 * i : 7 * i + 7]
        mean = part.sum().item() / (window.targets != IGNORED).sum()
        assert line["train_loss"] == pytest.approx(mean, rel=1e-4)


def test_from_keeps_tokenizer_and_weights(tmp_path):
    first = fit(tmp_path, "--max-steps", 2)
    other = tmp_path / "other.md"
    other.write_text("Entirely different words about 蛇 and hedgehogs. " * 40)
    second = tmp_path / "second"
    assert json.loads((first / "settings.json").read_text())["tokenizer"] == "bpe"
    argv = ["--data", str(other), "--from", str(first), "--run", str(second), "--lr", "0"]
    train.main([*argv, "--max-steps", "1", "--seq-len", "16", "--threads", "1"])
    assert (second / "last/tokenizer.json").read_bytes() == (
        first / "last/tokenizer.json"
    ).read_bytes()
    assert weights(second) == weights(first)
    assert json.loads((second / "settings.json").read_text())["tokenizer"] is None


def test_all_of_the_users_documents_are_used(tmp_path, capsys):
    data = str(corpus(tmp_path, documents=200))
    assert settings.parse([]).max_documents == 128
    assert settings.parse(["--data", data]).max_documents is None
    assert settings.parse([f"--data={data}"]).max_documents is None
    assert settings.parse(["--data", data, "--max-documents", "128"]).max_documents == 128
    argv = [*TINY, "--data", data, "--vocab-size", "300", "--max-steps", "1", "--run"]
    assert train.main([*argv, str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"190 documents to train on \(.* tokens\), 10 held out \(.* 5\.\d%\)", said)
    assert "left out" not in said
    assert train.main([*argv, str(tmp_path / "b"), "--max-documents", "50"]) == 0
    assert "left out: documents beyond --max-documents 50: 150 of 200" in capsys.readouterr().out


def test_too_little_text_for_a_held_out_curve(tmp_path, capsys):
    (tmp_path / "snakes.txt").write_text("The boa sleeps in the grass. " * 20)
    run = fit(tmp_path, "--vocab-size", 260, "--max-steps", 4, "--eval-every", 2)
    assert "too little text to hold any out" in capsys.readouterr().out
    assert not any(m.get("val_loss") for m in metrics(run))
    assert not (run / "best").exists()
    assert "held-out" not in (run / "samples.txt").read_text()


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_steps_that_are_not_finite_are_skipped_and_ten_stop_the_run(tmp_path, monkeypatch, capsys):
    real = step.batch_loss
    calls = 0

    def sometimes(*args):
        nonlocal calls
        calls += 1
        loss = real(*args)
        return Poison.apply(loss) if calls in (2, 3) else loss * torch.nan if calls == 5 else loss

    monkeypatch.setattr(step, "batch_loss", sometimes)
    run = fit(tmp_path, "--max-steps", 8, "--eval-every", 100)
    assert metrics(run)[-1]["skipped"] == 3
    assert all(p.isfinite().all() for p in checkpoint.load(run / "last").parameters())

    monkeypatch.setattr(step, "batch_loss", lambda *args: Poison.apply(real(*args)))
    run = fit(tmp_path, "--max-steps", 50, "--eval-every", 100)
    assert len(metrics(run)) == stopping.GIVE_UP_AFTER
    assert run_files.state(run) == "diverged"
    assert f"{stopping.GIVE_UP_AFTER} times in a row" in " ".join(capsys.readouterr().out.split())


def test_a_diverged_run_keeps_its_last_good_state_and_resumes_at_a_lower_rate(
    tmp_path, monkeypatch, capsys
):
    real = step.batch_loss
    calls = 0

    def from_the_sixth_step_on(*args):
        nonlocal calls
        calls += 1
        return real(*args) * (torch.nan if calls > 5 else 1)

    monkeypatch.setattr(step, "batch_loss", from_the_sixth_step_on)
    run = fit(tmp_path, "--max-steps", 50, "--eval-every", 100, "--checkpoint-every", 1)
    said = " ".join(capsys.readouterr().out.split())
    assert len(metrics(run)) == 15
    # The weights after step 5 are those that give no finite loss, so step 4 is the last good one.
    assert "last/ holds the earlier checkpoint of step 4; resume with a lower --lr" in said
    assert "--resume --lr 0.001" in said
    assert run_files.state(run) == "diverged"
    for name, expected in json.loads((run / "last/manifest.json").read_text()).items():
        assert hashlib.sha256((run / "last" / name).read_bytes()).hexdigest() == expected
    monkeypatch.setattr(step, "batch_loss", real)
    argv = ["--run", str(run), "--resume", "--max-steps", "7"]
    assert train.main([*argv, "--lr", "1e-4"]) == 0
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert metrics(run)[4]["lr"] < 1e-4
    assert run_files.state(run) == "all steps done"
    assert settings.read(run).lr == 1e-4


def test_a_clock_that_stands_still_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.time, "perf_counter", lambda: 5.0)
    run = fit(tmp_path, "--max-steps", 2)
    assert [m["tokens_per_s"] for m in metrics(run)] == [None, None]


def test_a_sample_takes_a_line_of_the_screen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "sample", lambda *_: ("[red]a\x1b[2J", "\n" * 100))
    run = fit(tmp_path, "--max-steps", 1)
    out = capsys.readouterr().out
    assert "[red]a\\x1b[2J" + "\\n" * 100 + "\n" in out
    assert "\x1b" not in out + (run / "samples.txt").read_text()
    assert (run / "samples.txt").read_text().count("\n") == 103


@pytest.mark.usefixtures("short_samples")
def test_a_warm_up_longer_than_the_time_is_said_at_the_end(tmp_path, capsys):
    run = fit(tmp_path, "--max-minutes", 1e-9, "--warmup-steps", 2)
    said = capsys.readouterr().out
    assert "the warm-up takes 2 steps; a lower --warmup-steps helps" in said
    suggested = float(" ".join(said.split()).partition("--resume --max-minutes ")[2].split()[0])
    assert 60 * suggested > metrics(run)[-1]["seconds"]
    fit(tmp_path, "--max-minutes", 1e-9, "--warmup-steps", 1)
    assert "--warmup-steps helps" not in capsys.readouterr().out


def test_the_end_says_how_to_go_on(tmp_path, capsys):
    run = fit(tmp_path, "--max-steps", 40, "--eval-every", 20, "--lr", 0.01)
    said = " ".join(capsys.readouterr().out.split())
    assert f"train it further: python -m ysnake.train --run {run} --resume --max-steps 80" in said
    assert "the held-out loss was still falling" in said


def test_a_preset_vocabulary_is_a_ceiling(tmp_path, capsys):
    data = str(corpus(tmp_path))
    argv = [*TINY, "--data", data, "--run", str(tmp_path / "run"), "--max-steps", "1"]
    assert train.main(argv) == 0
    assert "more text is needed for a larger one" in " ".join(capsys.readouterr().out.split())
    size = checkpoint.load_tokenizer(tmp_path / "run/last").get_vocab_size()
    assert size < PRESETS["quick"].max_vocab


def test_without_the_shipped_corpus_it_asks_for_data(tmp_path, monkeypatch):
    monkeypatch.setattr(new_run, "SHIPPED", tmp_path / "training_data")
    options = settings.Settings(data=(new_run.SHIPPED,), run=tmp_path / "run", max_steps=1)
    with pytest.raises(ValueError, match="--data: the shipped corpus is not installed here"):
        new_run.start(options, Console(quiet=True))


def test_help_explains_every_setting(tmp_path):
    text = python("ysnake.train", "--help", cwd=tmp_path).stdout
    words = " ".join(text.replace("│", " ").split())
    for name in vars(settings.Settings()):
        assert settings.option(name) in words
    assert "Embedding size" in words


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_presets_learn_at_any_batch_size(tmp_path, preset, batch_size, times):
    """With their learning rate and with a larger one, most of the time at its peak."""
    lr = times * PRESETS[preset].settings["lr"]
    steps = max(40, 1000 // (8 * batch_size))  # at least a thousand tokens
    options = ["--preset", preset, "--batch-size", batch_size, "--lr", lr, "--seq-len", "8"]
    command = ["ysnake.train", *options, "--max-steps", steps, "--warmup-steps", "10"]
    done = python(*command, "--eval-every", "1000", "--run", "run", cwd=tmp_path, timeout=3600)
    assert done.returncode == 0, done.stderr
    losses = [m["train_loss"] for m in metrics(tmp_path / "run")]
    assert metrics(tmp_path / "run")[-1]["skipped"] == 0
    assert sum(losses[-15:]) < sum(losses[:15])


@pytest.mark.slow
def test_the_quick_preset_learns_its_documents_by_heart(tmp_path):
    assert python("ysnake.train", "--run", "run", cwd=tmp_path, timeout=900).returncode == 0
    losses = [m["train_loss"] for m in metrics(tmp_path / "run")]
    assert sum(losses[-50:]) / 50 < 0.5
    options = json.loads((tmp_path / "run/settings.json").read_text())
    assert options["max_documents"] >= 60
    assert str(ROOT / "training_data") in options["data"]
