"""The table and the picture of `benchmarks.recipes`."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

LN2 = math.log(2)
BASELINE = "baseline"
HEAD = (
    "recipe",
    "rate",
    "nats per byte",
    "lowest to highest (seeds)",
    "tokens/s",
    "tokens",
    "time",
)
LEGEND = f"""\
Each recipe is shown at its best learning rate, among the rates that most seeds have trained.
`(edge)` marks a best rate that is the lowest or the highest that was tried. `tokens` and `time` are
what the recipe takes to reach the final loss of `{BASELINE}`, as a part of what that takes."""


@dataclass
class Trained:
    """One training. The curve has tokens, seconds and held-out nats per byte."""

    recipe: str
    lr: float
    seed: int
    curve: list[tuple[int, float, float]]

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
    target = None if base is None else fmean(run.loss for run in base[best_rate(base)])
    rows = []
    for name, rates in recipes.items():
        lr = best_rate(rates)
        runs = rates[lr]
        edge = " (edge)" if lr in (min(rates), max(rates)) else ""
        losses = [run.loss for run in runs]
        speed = fmean(run.curve[-1][0] / run.curve[-1][1] for run in runs)
        cells = [name, f"{lr:g}{edge}", f"{fmean(losses):.4f}"]
        cells += [f"{min(losses):.4f} to {max(losses):.4f} ({len(losses)})", f"{speed:,.0f}"]
        cells += [_part(runs, base, target, axis) for axis in (0, 1)]
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


def _part(runs: list[Trained], base: Rates | None, target: float | None, axis: int) -> str:
    """What the runs take to reach the target, divided by what the baseline takes in all."""
    if base is None or target is None:
        return ""
    if runs is base[best_rate(base)]:
        return "1.00"
    whole = fmean(run.curve[-1][axis] for run in base[best_rate(base)])
    taken = [run.reached(target, axis) for run in runs]
    reached = [each for each in taken if each is not None]
    if len(reached) < len(taken):
        return "not reached"
    return f"{fmean(reached) / whole:.2f}"


def draw(trained: Sequence[Trained], title: str, path: Path) -> None:
    """The losses of the best rates over tokens and minutes: means, and bands over the seeds."""
    if not trained:
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, rates in by_recipe(trained).items():
        lr = best_rate(rates)
        curves = [run.curve for run in rates[lr]]
        points = list(zip(*curves, strict=False))[1:]  # the first is far above the others
        for axes, axis, unit in zip(panels, (0, 1), (1e6, 60), strict=True):
            at = [fmean(point[axis] for point in each) / unit for each in points]
            losses = [[point[2] for point in each] for each in points]
            (line,) = axes.plot(at, [fmean(each) for each in losses], label=f"{name}, {lr:g}")
            low, high = ([pick(each) for each in losses] for pick in (min, max))
            axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
    for axes, label in zip(panels, ("million tokens", "minutes"), strict=True):
        axes.set(xlabel=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="held-out loss (nats per byte)")
    panels[1].legend(frameon=False)
    figure.suptitle(title, parse_math=False, fontsize=9)
    figure.savefig(path, dpi=130)
