"""Settings: what is refused by type and by bound, and which command line resumes a run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from small import ROOT

from ysnake import run
from ysnake.model.config import ModelConfig
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training import memory, settings
from ysnake.training.options import MOST_TOKENS, Settings
from ysnake.training.run import Progress
from ysnake.training.stopping import replace_limits


def stored(folder, **changes):
    """A run folder that holds nothing but settings, edited by hand."""
    settings.write(Settings(run=folder, max_steps=2))
    path = folder / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_settings_come_back_as_they_were(tmp_path):
    assert settings.read(stored(tmp_path)) == Settings(run=tmp_path, max_steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_run_of_an_older_version_keeps_what_it_trained_with(tmp_path):
    path = stored(tmp_path, optimizer="muon") / "settings.json"
    values = json.loads(path.read_text())
    del values["momentum"], values["beta2"], values["schedule"]
    path.write_text(json.dumps(values))
    for found in (settings.read(tmp_path), settings.parse(["--config", str(path)])):
        assert (found.momentum, found.beta2, found.schedule) == (0.95, 0.95, "cosine")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 1.5, "--seed: expected a whole number, got 1.5"),
        ("momentum", 1.0, "--momentum: expected from 0 to below 1, got 1.0"),
        ("beta2", -0.1, "--beta2: expected from 0 to below 1, got -0.1"),
        ("batch_size", 2.5, "--batch-size: expected a whole number, got 2.5"),
        ("batch_size", True, "--batch-size: expected a whole number, got True"),
        ("batch_size", None, "--batch-size: expected a whole number, got None"),
        ("batch_size", 10**9, f"expected at most {MOST_TOKENS:,} tokens in a step"),
        ("accumulate", 10**12, f"expected at most {MOST_TOKENS:,} tokens in a step"),
        ("seq_len", 10**30, "--seq-len: expected below"),
        ("precision", "bf16", "--precision: expected one of auto, float32, bfloat16, got 'bf16'"),
        ("tokenizer", ["bpe"], "--tokenizer: expected one of bpe, word"),
        ("preset", "huge", "--preset: expected one of quick,"),
        ("carry_state", "no", "--carry-state: expected true or false, got 'no'"),
        ("lr", "fast", "--lr: expected a number, got 'fast'"),
        ("lr", float("nan"), "--lr: expected at least 0, got nan"),
        ("max_steps", "9", "--max-steps: expected a whole number, got '9'"),
        ("max_steps", None, "--max-steps, --max-minutes: expected at least one of them"),
        ("device", 3, "--device: expected text, got 3"),
        ("memory", "lots", "--memory: expected a size like 8GB, got 'lots'"),
        ("data", "corpus", "not the settings of a run"),
        ("data", [3], "not the settings of a run"),
        ("from_", 5, "not the settings of a run"),
        ("speed", 5, "speed"),
    ],
)
def test_a_file_edited_by_hand_is_checked_as_options_are(tmp_path, name, value, said):
    with pytest.raises(InputError) as error:
        settings.read(stored(tmp_path, **{name: value}))
    if name == "data" and value == "corpus":  # each letter would be a path
        assert "expected a list" in str(error.value)
    assert said in str(error.value)
    assert str(tmp_path / "settings.json") in str(error.value)
    assert len(str(error.value)) < 600


def test_a_step_larger_than_the_memory_is_refused_with_the_batch_that_fits(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 4e9)
    config = ModelConfig(vocab_size=1024, d_model=64, n_layers=2, d_state=8, head_dim=8)
    memory.check(Settings(batch_size=16), config, "cpu")
    with pytest.raises(InputError, match=r"--batch-size \d+ fits") as error:
        memory.check(Settings(batch_size=100_000), config, "cpu")
    fits = int(str(error.value).partition("--batch-size ")[2].split()[0])
    memory.check(Settings(batch_size=fits), config, "cpu")
    with pytest.raises(InputError, match="a smaller model takes less"):
        memory.check(Settings(batch_size=1, seq_len=10_000_000), config, "cpu")


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    config = ModelConfig(vocab_size=1024, d_model=64, n_layers=2, d_state=8, head_dim=8)
    one = memory.predict(config, Settings(batch_size=2000)).peak
    monkeypatch.setattr(memory, "available", lambda: one)
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    given = Settings(batch_size=8000)
    memory.check(given, config, "cpu")  # on four machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = r"in each of 2 processes, .*; --batch-size \d+ fits$"
    with pytest.raises(InputError, match=said) as error:
        memory.check(given, config, "cpu")
    fits = int(str(error.value).partition("; --batch-size ")[2].split()[0])
    assert fits % 4 == 0
    memory.check(replace(given, batch_size=fits), config, "cpu")
    memory.check(given, config, "cuda")  # each has a GPU of its own


BEGUN = ["--data", "a.txt", "--run", "run", "--from", "base", "--seed", "3", "--max-steps", "2"]


def resumed(*argv):
    return settings.parse([*argv, "--resume"])


@pytest.fixture
def begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    first = Settings(data=(Path("a.txt"),), run=Path("run"), from_=Path("base"), seed=3)
    first.max_steps, first.memory = 2, "4GB"
    first.batch_size, first.accumulate, first.recompute = 4, 4, True  # as --memory has chosen
    settings.write(first)


def test_the_command_line_that_began_a_run_resumes_it(begun):
    again = resumed(*BEGUN, "--memory", "4GB", "--batch-size", "16", "--accumulate", "1")
    assert (again.batch_size, again.accumulate, again.recompute) == (4, 4, True)
    assert resumed("--run", "run").batch_size == 4


def test_a_flag_of_the_run_may_be_given_again(begun):
    write_flags(Path("run"), carry_state=True)  # recompute is set already
    again = resumed("--run", "run", "--carry-state", "--recompute")
    assert (again.carry_state, again.recompute) == (True, True)
    assert resumed("--run", "run", "--carry_state").carry_state
    write_flags(Path("run"), carry_state=False)
    with pytest.raises(
        InputError, match="--carry-state: cannot change in a resumed run, which has False"
    ):
        resumed("--run", "run", "--carry-state")


def write_flags(folder, **flags):
    path = folder / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))


def test_another_chunk_size_may_be_given(begun):
    assert resumed("--run", "run", "--chunk-size", "32").chunk_size == 32
    assert resumed("--run", "run").chunk_size is None


def test_the_page_names_what_a_resumed_run_may_change():
    page = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    said = page.partition("These may change: ")[2].partition(" With another")[0]
    free = {settings.option(name) for name in settings.FREE_ON_RESUME}
    assert set(re.findall(r"--[a-z-]+", said)) == free - {"--config", "--run", "--resume", "--plan"}


def test_a_refused_setting_is_shown_as_a_user_writes_it(begun):
    with pytest.raises(InputError) as error:
        resumed("--run", "run", "--data", "b.txt", "c.txt")
    assert "PosixPath" not in str(error.value)
    assert "a.txt; got b.txt c.txt; --from run trains its weights" in str(error.value)
    with pytest.raises(InputError, match="which has the default; got 300"):
        resumed("--run", "run", "--vocab-size", "300")


def test_another_rate_and_other_limits_may_be_given(begun):
    again = resumed("--run", "run", "--lr", "1e-5", "--warmup-steps", "7", "--max-steps", "99")
    assert (again.lr, again.warmup_steps, again.max_steps) == (1e-5, 7, 99)


def test_an_option_without_a_value_by_default_is_shown_with_its_kind(capsys):
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    shown = capsys.readouterr().out
    assert "--max-steps INT" in shown
    assert "--tokenizer {bpe,word}" in shown
    assert "{None}" not in shown
    assert "(default: None)" not in shown
    assert "(default: False)" not in shown


def test_the_help_of_an_option_is_one_paragraph(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    shown = capsys.readouterr().out
    assert "Train a Mamba-2 language model." in shown
    assert "The same --lr suits both." in shown


def test_the_learning_rate_has_a_long_name_too():
    assert settings.parse(["--learning-rate", "0.25"]).lr == 0.25


def test_none_lifts_a_limit_of_a_resumed_run(begun):
    again = resumed("--run", "run", "--max-steps", "None", "--max-minutes", "9")
    assert (again.max_steps, again.max_minutes) == (None, 9)


def test_another_limit_lifts_one_that_is_reached():
    """Else a run whose steps are done would not go on by time."""
    stored = Settings(max_steps=20, max_minutes=None)
    done = Progress(step=20, elapsed=90)
    again = replace(stored, max_minutes=9)
    lines = replace_limits(again, stored, done)
    assert (again.max_steps, again.max_minutes) == (None, 9)
    assert lines == ["--max-steps 20 was reached and no longer applies"]
    for unchanged in (stored, Settings(max_steps=20, max_minutes=None, patience=3)):
        assert replace_limits(unchanged, stored, done) == []
        assert unchanged.max_steps == 20
    later = replace(stored, max_steps=40, max_minutes=9)
    assert replace_limits(later, stored, done) == []
    assert (later.max_steps, later.max_minutes) == (40, 9)
    with pytest.raises(InputError, match=r"--max-minutes: .* 20 steps and 1.5 minutes .* got 1;"):
        replace_limits(replace(stored, max_minutes=1), stored, done)


def test_a_resumed_run_keeps_a_limit(begun):
    with pytest.raises(InputError, match="--max-steps, --max-minutes: expected at least one"):
        resumed("--run", "run", "--max-steps", "None")


@pytest.mark.parametrize(
    "options",
    [
        ["--data", "b.txt"],
        ["--from", "other"],
        ["--seed", "4"],
        ["--batch-size", "5"],
        ["--memory", "8GB"],
        ["--preset", "ys-24m"],
    ],
)
def test_another_run_is_refused(begun, options):
    with pytest.raises(InputError, match=options[0]):
        resumed("--run", "run", *options)


def test_values_of_a_repeated_option_count_together(tmp_path):
    """argparse and tyro would take the last ones alone, and lose a text without a word."""
    found = settings.parse(["--data", "a.txt", "--seed", "1", "--data=b.txt", "--data", "c", "d"])
    assert [path.name for path in found.data] == ["a.txt", "b.txt", "c", "d"]
    assert (found.seed, found.max_documents) == (1, None)
    argv = ["runs/mine", "--stop", "x", "--top-k", "3", "--stop", "y", "--stop=z"]
    expected = ["runs/mine", "--top-k", "3", "--stop", "x", "y", "z"]
    assert cli.together(run.Options, argv) == expected
    assert cli.together(run.Options, argv[:5]) == argv[:5]


def test_a_file_by_hand_has_today_s_defaults_in_json_too(tmp_path):
    for name, text in (("a.json", '\ufeff{"size": "3M"}'), ("a.toml", '\ufeffsize = "3M"')):
        (tmp_path / name).write_text(text, encoding="utf-8")  # as some editors begin it
        found = settings.parse(["--config", str(tmp_path / name)])
        assert (found.optimizer, found.momentum, found.beta2) == ("muon", 0.9, None)


def test_a_momentum_that_nothing_uses_is_refused():
    with pytest.raises(InputError, match="--momentum: applies to --optimizer muon only"):
        settings.parse(["--optimizer", "adamw", "--momentum", "0.5"])


def test_an_underscore_and_an_equals_sign_name_a_run_s_tokens(tmp_path):
    stored(tmp_path, data=["other.txt"])
    found = settings.parse([f"--tokens_from={tmp_path}"])
    assert [path.name for path in found.data] == ["other.txt"]


def test_precision_auto_keeps_the_precision_of_a_resumed_run(tmp_path):
    stored(tmp_path, precision="float32")
    again = ["--resume", "--run", str(tmp_path), "--precision"]
    assert settings.parse([*again, "auto"]).precision == "float32"
    with pytest.raises(InputError, match="--precision: cannot change"):
        settings.parse([*again, "bfloat16"])
