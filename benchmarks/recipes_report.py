"""The table and the picture of `benchmarks.recipes`."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

LN2 = math.log(2)
MOST_WITH_FIRST = 3  # evaluations of a training up to which the picture shows the first one
Point = tuple[int, float, float]
BASELINE = "baseline"
HEAD = (
    "recipe",
    "rate",
    "nats per byte",
    "lowest to highest (seeds)",
    "beside the baseline",
    "tokens/s",
    "tokens",
    "time",
)
LEGEND = f"""\
Each recipe is shown at its best learning rate, among the rates that most seeds have trained.
`(edge)` marks a best rate that is the lowest or the highest that was tried. A seed decides first
weights and the order of the batches, and some orders are harder than others. So three columns
compare trainings of the same seed. `beside the baseline` is the loss minus that of `{BASELINE}`:
mean, lowest and highest. `tokens` is the number of tokens with which the recipe reaches the final
loss of `{BASELINE}`, divided by all tokens of `{BASELINE}`. `time` is the same ratio of times. Both
are means. The picture shows the recipes with the most seeds."""


@dataclass
class Trained:
    """One training. The curve has tokens, seconds and held-out nats per byte."""

    recipe: str
    lr: float
    seed: int
    curve: list[Point]

    @property
    def loss(self) -> float:
        return self.curve[-1][2]

    def reached(self, loss: float, axis: int) -> float | None:
        """Tokens (axis 0) or seconds (axis 1) until this loss; None if it was not reached."""
        before = self.curve[0]
        for point in self.curve:
            if point[2] <= loss:
                part = (before[2] - loss) / (before[2] - point[2]) if point != before else 1.0
                return before[axis] + part * (point[axis] - before[axis])
            before = point
        return None


Rates = dict[float, list[Trained]]


def by_recipe(trained: Iterable[Trained]) -> dict[str, Rates]:
    """The trainings of each recipe and learning rate, the rates in order."""
    found: dict[str, Rates] = defaultdict(lambda: defaultdict(list))
    for each in sorted(trained, key=lambda each: (each.recipe, each.lr, each.seed)):
        found[each.recipe][each.lr].append(each)
    return found


def best_rate(rates: Rates) -> float:
    """The learning rate with the lowest mean loss, among those that most seeds have trained."""
    seeds = max(map(len, rates.values()))
    whole = [lr for lr, runs in rates.items() if len(runs) == seeds]
    return min(whole, key=lambda lr: fmean(run.loss for run in rates[lr]))


def markdown(trained: Sequence[Trained], title: str) -> str:
    """A table of the recipes at their best rates, and one of all rates."""
    recipes = by_recipe(trained)
    base = recipes.get(BASELINE)
    beside = {} if base is None else {run.seed: run for run in base[best_rate(base)]}
    rows = []
    for name, rates in recipes.items():
        lr = best_rate(rates)
        runs = rates[lr]
        edge = " (edge)" if lr in (min(rates), max(rates)) else ""
        losses = [run.loss for run in runs]
        speed = fmean(run.curve[-1][0] / run.curve[-1][1] for run in runs)
        cells = [name, f"{lr:g}{edge}", f"{fmean(losses):.4f}"]
        cells += [f"{min(losses):.4f} to {max(losses):.4f} ({len(losses)})"]
        pairs = [(run, beside[run.seed]) for run in runs if run.seed in beside]
        cells += [_difference(pairs), f"{speed:,.0f}", _part(pairs, 0), _part(pairs, 1)]
        rows.append((fmean(losses), cells))
    lines = [f"# {title}", "", _row(HEAD), _row(["---"] * len(HEAD))]
    lines += [_row(cells) for _, cells in sorted(rows)]
    lines += ["", LEGEND, "", "Mean loss at each rate (seeds):", ""]
    all_rates = sorted({run.lr for run in trained})
    lines += [_row(["recipe", *(f"{lr:g}" for lr in all_rates)])]
    lines += [_row(["---"] * (1 + len(all_rates)))]
    for name, rates in recipes.items():
        means = (_mean(rates[lr]) if lr in rates else "" for lr in all_rates)
        lines.append(_row([name, *means]))
    return "\n".join(lines) + "\n"


def _mean(runs: list[Trained]) -> str:
    return f"{fmean(run.loss for run in runs):.4f} ({len(runs)})"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _difference(pairs: list[tuple[Trained, Trained]]) -> str:
    """Loss minus the baseline's, of trainings with the same seed: mean, lowest and highest."""
    found = [run.loss - other.loss for run, other in pairs if run is not other]
    return f"{fmean(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})" if found else ""


def _part(pairs: list[tuple[Trained, Trained]], axis: int) -> str:
    """Tokens or time to the baseline's final loss, divided by those of the baseline: the mean."""
    taken = [(run.reached(other.loss, axis), other.curve[-1][axis]) for run, other in pairs]
    parts = [part / whole for part, whole in taken if part is not None]
    if not pairs:
        return ""
    return f"{fmean(parts):.2f}" if len(parts) == len(pairs) else "not reached"


def shown_points(curves: Sequence[Sequence[Point]]) -> list[tuple[Point, ...]]:
    """The points of some curves, evaluation by evaluation.

    The first is far above the others, so it is left out where three or more others remain.
    """
    points = list(zip(*curves, strict=False))
    return points[1:] if len(points) > MOST_WITH_FIRST else points


def draw(trained: Sequence[Trained], title: str, path: Path) -> None:
    """The losses of the best rates over tokens and minutes: means, and bands over the seeds.

    Only the recipes with the most seeds are drawn, or all where a single one has most.
    """
    if not trained:
        return
    best = {name: rates[best_rate(rates)] for name, rates in by_recipe(trained).items()}
    seeds = max(map(len, best.values()))
    whole = [runs for runs in best.values() if len(runs) == seeds]
    whole = whole if len(whole) > 1 else list(best.values())
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for runs in sorted(whole, key=lambda runs: fmean(run.loss for run in runs)):
        points = shown_points([run.curve for run in runs])
        for axes, axis, unit in zip(panels, (0, 1), (1e6, 60), strict=True):
            at = [fmean(point[axis] for point in each) / unit for each in points]
            losses = [[point[2] for point in each] for each in points]
            name, mean = f"{runs[0].recipe}, {runs[0].lr:g}", [fmean(each) for each in losses]
            (line,) = axes.plot(at, mean, marker="o", markersize=3, label=name)
            low, high = ([pick(each) for each in losses] for pick in (min, max))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
    for axes, label in zip(panels, ("million tokens", "minutes"), strict=True):
        axes.set(xlabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="held-out loss (nats per byte)")
    panels[0].legend(frameon=False)
    figure.suptitle(title, parse_math=False, fontsize=9)
    figure.savefig(path, dpi=130)
