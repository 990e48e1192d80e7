"""--size: which settings follow from a size, a text and a time, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from small import ROOT, corpus, entry

import ysnake
from ysnake import train
from ysnake.model.config import ModelConfig, model_config
from ysnake.shared.errors import InputError
from ysnake.training import expectation, settings, size, speed
from ysnake.training.memory import predict
from ysnake.training.options import Settings
from ysnake.training.size import SIZES

TINY = ["--d-model", "32", "--n-layers", "1", "--d-state", "8", "--head-dim", "8"]
TINY += ["--seq-len", "24", "--batch-size", "2"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "MEASURED_SECONDS", 0.1)
    return corpus(tmp_path)


def parsed(*argv):
    return settings.parse([*map(str, argv)])


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_about_as_many_parameters_as_its_name_says(name):
    chosen = SIZES[name]
    config = ModelConfig(
        chosen.vocabulary // 64 * 64, chosen.d_model, chosen.n_layers, chosen.d_state
    )
    exact = predict(config, Settings()).parameters
    assert exact == pytest.approx(1e6 * int(name.removesuffix("M")), rel=0.15)
    assert chosen.parameters == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("name", "rate"), {"3M": 0.012, "10M": 0.0078, "24M": 0.0059, "71M": 0.0039}.items()
)
def test_a_size_and_a_time_determine_the_rest(text, name, rate):
    found = parsed("--size", name, "--data", text, "--max-minutes", "5")
    assert (found.size, found.preset, found.lr) == (name, None, rate)
    assert (found.optimizer, found.schedule) == ("muon", "cosine")
    assert (found.batch_size, found.seq_len) == (16, 128)
    assert (found.max_minutes, found.max_steps) == (5, None)
    assert found.patience
    sizes = (found.d_model, found.n_layers, found.d_state)
    assert sizes == (SIZES[name].d_model, SIZES[name].n_layers, SIZES[name].d_state)


def test_the_rate_of_a_very_small_model_is_limited():
    assert size.Size(64, 1, 8, 300).rate == size.LARGEST_RATE


def test_options_win_over_the_size(text):
    found = parsed("--size", "3M", "--data", text, "--d-state", "16", "--lr", "0.5")
    assert (found.d_state, found.lr, found.d_model) == (16, 0.5, 256)
    Path("run.toml").write_text('size = "10M"\nlr = 0.25\n')
    found = parsed("--config", "run.toml", "--data", text, "--n-layers", "2")
    assert (found.size, found.lr, found.n_layers, found.d_model) == ("10M", 0.25, 2, 384)


def test_the_steps_follow_from_the_text(text):
    assert parsed("--size", "3M", "--data", text).max_steps == size.LEAST_STEPS
    large = Path("large.txt")
    with large.open("wb") as file:
        file.truncate(9_400_000)
    found = parsed("--size", "3M", "--data", large).max_steps
    assert found == size.MOST_PASSES * 9_400_000 // size.BYTES_PER_TOKEN // (8 * 256)
    assert parsed("--size", "3M", "--data", large, "--batch-size", "32").max_steps == found // 2
    with large.open("wb") as file:
        file.truncate(10**11)  # sparse
    of_small, of_large = (parsed("--size", n, "--data", large).max_steps for n in ("3M", "71M"))
    assert of_small < 30_000 < of_large


def test_the_tokens_of_a_run_with_a_limit_of_documents_are_enough(text):
    """Their number is known. The quick preset has such a limit, which its tokens bring along."""
    Path("quick").mkdir()
    settings.write(Settings(run=Path("quick"), max_steps=350, max_documents=128))
    found = parsed("--size", "3M", "--tokens-from", "quick")
    assert (found.max_steps, found.max_documents) == (size.LEAST_STEPS, 128)


def test_a_small_text_gets_a_small_vocabulary():
    chosen = Settings(size="24M", preset=None)
    assert size.vocabulary(chosen, 9_400_000) == 13_183
    assert size.vocabulary(chosen, 200_000) == 2_000
    assert size.vocabulary(chosen, 10) == size.LEAST_VOCABULARY
    assert size.vocabulary(Settings(size="24M", preset=None, vocab_size=900), 10) == 900
    assert size.vocabulary(Settings(), 10) == 4096  # a preset's, as before


def test_without_a_size_nothing_changes():
    found = parsed()
    assert (found.size, found.preset, found.max_steps, found.d_model) == (None, "quick", 350, 256)
    found = parsed("--max-minutes", "5")
    assert (found.preset, found.stop_at_loss, found.max_documents) == ("quick", 0.15, 128)


REFUSED = {
    "--preset, --size: give only one of them": ["--size", "3M", "--preset", "ys-24m"],
    "--size: expected one of 3M, 10M, 24M, 71M, auto, got 5M": ["--size", "5M"],
    "--size: the checkpoint that --from names": ["--size", "3M", "--from", "model"],
    "--size: auto needs a time, --max-minutes M": ["--size", "auto"],
    "--max-documents: with --size it needs --max-steps or": [
        "--size",
        "3M",
        "--max-documents",
        "3",
    ],
    "--d-model": ["--size", "3M", "--d-model", "-3"],
    "--batch-size: expected at least 1": ["--size", "3M", "--batch-size", "0"],
    "no-such.txt: no such file": ["--size", "3M", "--data", "no-such.txt"],
    "--size 3M, 10M, 24M or 71M chooses": ["--preset", "huge"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused(text, said):
    with pytest.raises(InputError) as error:
        parsed("--data", text, *REFUSED[said])
    assert said in str(error.value)


def test_auto_is_refused_with_several_processes(text, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--size: auto works with one process"):
        parsed("--size", "auto", "--data", text, "--max-minutes", "1")


def test_both_in_python_and_in_a_file_are_refused(text):
    with pytest.raises(InputError, match="preset"):
        ysnake.train(data=text, preset="quick", size="3M", quiet=True)
    Path("run.toml").write_text('preset = "quick"\n')
    with pytest.raises(InputError, match="--preset, --size"):
        parsed("--config", "run.toml", "--size", "3M")


@pytest.mark.parametrize(
    ("minutes", "n_bytes", "chosen", "asked", "reason"),
    [
        (10, 10**7, "3M", 1, "tokens in 10 minutes"),  # at 1,000 tokens/s
        (300, 10**8, "10M", 2, "tokens in 300 minutes"),
        (3000, 10**9, "71M", 3, "the largest"),
        (3000, 10**5, "3M", 0, "in at most 4 passes over this text"),
    ],
)
def test_auto_takes_the_largest_size_that_sees_enough(minutes, n_bytes, chosen, asked, reason):
    measured, said = [], []

    def made_up(name):
        measured.append(name)
        return 1000.0

    assert size.largest_for(minutes, n_bytes, made_up, said.append) == chosen
    assert measured == list(SIZES)[1 : asked + 1]
    assert f"--size auto: {chosen}" in said[0]
    assert reason in said[0]


def test_what_to_expect_is_said_in_two_lines(text):
    config = ModelConfig(4096, 256, 4, 64)
    chosen = parsed("--size", "3M", "--data", text, "--max-minutes", "10")
    first, second = expectation.lines(chosen, config, 3e6, 2200.0)
    assert "4 layers of width 256, a vocabulary of 4,096; muon at a peak rate of 0.012" in first
    assert "ends after 10 minutes or 5 evaluations without" in first
    assert "about 10 minutes at 2,200 tokens/s" in second
    assert "1.32 million tokens, 0.4 passes" in second
    assert "1.21 nats (1.75 bits) per byte after 0.31 million" in second
    chosen.max_minutes, chosen.max_steps = None, 100_000
    _, second = expectation.lines(chosen, config, 3e6, 2200.0)
    assert "about 26 hours" in second
    chosen.max_steps = 1
    assert "nats" not in expectation.lines(chosen, config, 3e6, 2200.0)[1]  # not measured


def test_a_run_keeps_what_was_chosen_when_it_is_resumed(text):
    begun = ["--size", "auto", "--data", text, "--run", "run", *TINY]
    begun += ["--max-minutes", "5", "--max-steps", "2"]
    code, out, errors = entry(train.main, *begun)
    assert code == 0, errors
    assert "--size auto: 3M, since 10M would learn" in out
    assert out.index("--size 3M: 1 layer of width 32") < out.index("expect about")
    stored = json.loads(Path("run/settings.json").read_text())
    assert (stored["size"], stored["preset"], stored["lr"]) == ("3M", None, 0.012)
    assert parsed(*begun, "--resume").size == "3M"
    code, out, errors = entry(train.main, "--resume", "--max-steps", "3", "--run", "run")
    assert code == 0, errors
    assert "expect about" not in out
    assert json.loads(Path("run/settings.json").read_text())["lr"] == 0.012
    with pytest.raises(
        InputError, match="--size: cannot change in a resumed run, which has 3M; got 10M"
    ):
        parsed("--resume", "--run", "run", "--size", "10M")
    assert parsed("--config", "run/settings.json", "--seed", "1").size == "3M"
    for other in (["--size", "10M"], ["--preset", "ys-24m"]):  # the file would win over it
        with pytest.raises(InputError, match=f"--config, {other[0]}: run/settings.json has all"):
            parsed("--config", "run/settings.json", *other)
    with pytest.raises(InputError, match="config, size: "):
        ysnake.train(config="run/settings.json", size="24M", quiet=True)


def test_the_plan_of_a_size_says_what_to_expect(text):
    code, out, errors = entry(train.main, "--plan", "--size", "3M", "--data", text, *TINY)
    assert code == 0, errors
    assert "--size 3M: 1 layer" in out
    assert "expect about" in out
    assert "predicted peak" in out
    assert not Path("runs").exists()


def test_the_page_has_the_values_of_each_size():
    page = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    for name, chosen in SIZES.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*)$", page, flags=re.M)
        training = Settings(**size.settings_of(name))
        plan = predict(model_config(training, chosen.vocabulary, 0), training)
        assert [cell.strip() for cell in row.split("|")][:6] == [
            f"{plan.parameters / 1e6:.1f} million",
            f"{chosen.d_model} x {chosen.n_layers}",
            str(chosen.d_state),
            f"{chosen.vocabulary:,}",
            f"{chosen.rate:g}",
            f"{plan.peak / 1e9:.2f} GB",
        ]


def test_nothing_is_measured_that_does_not_fit_into_the_memory(text, monkeypatch):
    """The steps that measure the speed would end the process."""

    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr("ysnake.training.speed.measure", never)
    huge = ["--batch-size", "400000", "--vocab-size", "512", "--plan", "--data", text]
    code, out, errors = entry(train.main, "--size", "3M", *huge)
    assert code == 0, errors
    assert "expect about" not in out
    assert "predicted peak" in out
    said = []
    assert size.largest_for(10**6, 10**9, lambda name: None, said.append) == "3M"
    assert said == ["--size auto: 3M, since a step of 10M does not fit into the memory"]
