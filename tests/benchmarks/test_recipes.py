"""Recipes are trained once, and compared at their best learning rates."""

import json

import pytest

from benchmarks import recipes
from benchmarks.recipes_report import Trained, best_rate, by_recipe, markdown, shown_points
from ysnake import train
from ysnake.shared.errors import InputError
from ysnake.training.signals import Stop


def run(recipe, lr, seed, *losses):
    return Trained(recipe, lr, seed, [(100 * k, 10.0 * k, loss) for k, loss in enumerate(losses)])


RUNS = [
    *(run("baseline", 1e-3, seed, 9, 5, 4.2 + seed / 10) for seed in (0, 1)),
    *(run("baseline", 2e-3, seed, 9, 5, 4.0 + seed / 10) for seed in (0, 1)),
    *(run("baseline", 4e-3, seed, 9, 6, 5.0) for seed in (0, 1)),
    run("baseline", 8e-3, 0, 9, 3, 2),  # the other seed is missing
    *(run("other", 1e-3, seed, 9, 4.1, 3) for seed in (0, 1)),
    *(run("other", 2e-3, seed, 9, 4, 2) for seed in (0, 1)),
]


def test_the_best_rate_is_one_that_all_seeds_have():
    rates = by_recipe(RUNS)
    assert best_rate(rates["baseline"]) == 2e-3
    assert best_rate(rates["other"]) == 2e-3


def test_the_table_says_what_a_recipe_takes_to_reach_the_baseline():
    rows = {}
    for line in markdown(RUNS, "title").splitlines():
        if line.startswith(("| baseline", "| other")):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0], cells)
    assert rows["baseline"][1:4] == ["0.002", "4.0500", "4.0000 to 4.1000 (2)"]
    assert rows["baseline"][4] == ""
    assert rows["baseline"][6:] == ["1.00", "1.00"]
    assert rows["other"][1] == "0.002 (edge)"
    assert "| baseline | 4.2500 (2) | 4.0500 (2) | 5.0000 (2) | 2.0000 (1) |" in markdown(RUNS, "")
    # The baseline ends at 4 and 4.1 with the two seeds, after 200 tokens. In the first 100 tokens
    # `other` falls from 9 to 4. So it reaches 4.0 after 100 and 4.1 after 98.
    assert rows["other"][4] == "-2.0500 (-2.1000 to -2.0000)"
    assert rows["other"][6:] == ["0.49", "0.49"]


def bracket(*runs, failed=(), lr=(2e-3, 4e-3, 8e-3)):
    """What --bracket adds to a grid of rates of one recipe, for two seeds."""
    wanted = [recipes.Training("baseline", rate, 0) for rate in lr]
    options = recipes.Options(lr=lr, seed=(0, 1))
    added = recipes.bracket(options, wanted, [run("baseline", *each) for each in runs], failed)
    return [(each.lr, each.seed) for each in added]


def test_a_short_curve_is_drawn_whole():
    curves = [[(step, 1.0, 2.0) for step in range(steps)] for steps in (2, 5)]
    assert [[point[0][0] for point in shown_points([curve])] for curve in curves] == [
        [0, 1],
        [1, 2, 3, 4],
    ]


def test_other_seeds_train_at_the_best_rate_of_the_first():
    grid = [(2e-3, 0, 5), (4e-3, 0, 4), (8e-3, 0, 6)]
    assert bracket(*grid[:2]) == []  # a rate is still missing
    assert bracket(*grid) == [(4e-3, 1)]
    assert bracket(*grid, (2e-3, 1, 3)) == [(4e-3, 1)]  # the first seed decides
    diverged = recipes.Training("baseline", 8e-3, 0)
    assert bracket(*grid[:2], failed=[diverged]) == [(4e-3, 1)]


def test_a_best_rate_at_the_edge_is_bracketed():
    rising = [(2e-3, 0, 5), (4e-3, 0, 6), (8e-3, 0, 7)]
    assert (1e-3, 0) in bracket(*rising)
    assert bracket(*rising, (1e-3, 0, 5.5)) == [(2e-3, 1)]
    falling = [(2e-3, 0, 7), (4e-3, 0, 6), (8e-3, 0, 5)]
    assert (16e-3, 0) in bracket(*falling)
    failed = [recipes.Training("baseline", rate, 0) for rate in (2e-3, 4e-3, 8e-3)]
    assert bracket(failed=failed) == []


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text, and a model that trains on it in no time."""
    tiny = {"d_model": 32, "n_layers": 1, "d_state": 8, "head_dim": 8, "vocab_size": 270}
    monkeypatch.setitem(recipes.SIZES, "3M", tiny)
    path = tmp_path / "text.txt"
    path.write_text("A snake has no legs, and the hedge has no snake. " * 400)
    return path


def test_all_recipes_see_the_same_tokens():
    options = recipes.Options(steps=200, warmup_steps=50, evaluations=5)
    usual = recipes.lengths(options, {"lr": 1e-3})
    assert (usual["max_steps"], usual["warmup_steps"], usual["eval_every"]) == (200, 50, 40)
    halved = recipes.lengths(options, recipes.RECIPES["batch-4"])
    assert halved == {name: 2 * value for name, value in usual.items()}
    assert "max_steps" not in recipes.lengths(recipes.Options(minutes=1.0), {})


def test_what_is_trained_is_not_trained_again(text, tmp_path):
    options = ["--text", str(text), "--steps", "2", "--lr", "0.01", "--seed", "1"]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert recipes.main(options) == 0
    metrics = next((tmp_path / "runs").rglob("metrics.jsonl"))
    written = metrics.stat().st_mtime_ns
    assert recipes.main(options) == 0
    assert metrics.stat().st_mtime_ns == written
    other = tmp_path / "other.txt"
    other.write_text("another text")
    with pytest.raises(InputError, match=r"--text: .* was trained on .*/text\.txt"):
        recipes.main(["--text", str(other), *options[2:]])
    files = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert files == {".json", ".md", ".png"}
    results = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["runs"]
    (result,) = results
    assert result["seed"] == 1
    assert (result["recipe"], result["lr"]) == ("baseline", 0.01)
    assert [point[0] for point in result["curve"]] == [2048, 4096]
    assert 0 < result["curve"][1][2] < 10


@pytest.mark.slow
def test_tokens_are_enough_and_a_failed_training_stops_no_other(text, tmp_path, monkeypatch):
    made = tmp_path / "made"
    sizes = [f"--{k}={v}".replace("_", "-") for k, v in recipes.SIZES["3M"].items()]
    train.main(["--data", str(text), *sizes, "--max-steps", "1", "--run", str(made)])
    moved = made.rename(tmp_path / "moved")
    text.unlink()
    monkeypatch.setitem(recipes.RECIPES, "broken", {"n_layers": 0})
    out = tmp_path / "out"
    options = ["--tokens-from", str(moved), "--recipe", "broken", "baseline", "--steps", "2"]
    options += ["--at-once", "2", "--lr", "0.01", "--seed", "0"]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert recipes.main(options) == 1
    results = json.loads(next(out.glob("*.json")).read_text())
    assert "on text.txt, 8 x 256 tokens" in results["title"]
    assert [each["recipe"] for each in results["runs"]] == ["baseline"]
    with pytest.raises(InputError, match="--tokens-from: --size 24M needs a vocabulary of 13183"):
        recipes.main([*options, "--size", "24M"])
    with pytest.raises(InputError, match="--text, --tokens-from: expected one of them"):
        recipes.main([*options, "--text", str(text)])


def test_an_unknown_recipe_is_named():
    with pytest.raises(InputError, match=r"--recipe: expected some of baseline, .*, got no-such"):
        recipes.main(["--text", "x", "--recipe", "no-such"])


def test_no_training_begins_after_a_stop(tmp_path):
    options = recipes.Options(text=(tmp_path,), runs=tmp_path / "runs")
    stop = Stop()
    stop.requested = True
    recipes.train_unless_ended(options, recipes.Training("baseline", 1e-3, 0), stop)
    assert not options.runs.exists()
