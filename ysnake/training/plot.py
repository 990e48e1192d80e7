"""The plot of a run: training and held-out loss over the steps in its metrics.jsonl."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ysnake.shared import cli, files
from ysnake.shared.run_files import RECENT
from ysnake.shared.shown import escape_controls

if TYPE_CHECKING:
    from rich.console import Console


def draw_loss(folder: Path, console: "Console") -> None:
    """Redraw `folder`/loss.png. If that fails, print a warning; training continues."""
    try:
        plot_loss(folder)
    except Exception as error:  # matplotlib raises many kinds, for a font or a full disk
        reason = cli.markup(str(error).partition("\n")[0] or type(error).__name__)
        console.print(f"warning: {cli.markup(folder / 'loss.png')} cannot be drawn ({reason})")


def plot_loss(folder: Path) -> None:
    """Redraw `folder`/loss.png."""
    import numpy as np
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [(x["step"], x["train_loss"]) for x in lines if x["train_loss"] is not None]
    val = [(x["step"], x["val_loss"]) for x in lines if x.get("val_loss") is not None]
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = map(np.array, zip(*train, strict=True))
    axes.plot(steps, losses, color="#9ec9a5", linewidth=0.8, label="training, each step")
    if len(losses) >= RECENT:
        mean = np.convolve(losses, np.full(RECENT, 1 / RECENT), mode="valid")
        label = f"training, mean of {RECENT}"
        axes.plot(steps[RECENT - 1 :], mean, color="#1b7837", linewidth=1.8, label=label)
        axes.annotate(
            f"{mean[-1]:.2f}", (steps[-1], mean[-1]), xytext=(4, 0), textcoords="offset points"
        )
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="#762a83", markersize=4, label="held out")
        axes.annotate(f"{val[-1][1]:.2f}", val[-1], xytext=(4, 0), textcoords="offset points")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.set_title(escape_controls(folder.resolve().name), parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with files.replacing(folder / "loss.png") as new, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure.savefig(new, dpi=150, format="png")


def recent_means(losses: Sequence[float]) -> list[float]:
    """For each step the mean of the last RECENT losses, or of all so far where these are fewer."""
    ends = range(1, len(losses) + 1)
    return [fmean(losses[max(0, end - RECENT) : end]) for end in ends]


def plot_two(runs: dict[str, list[dict]], path: Path, per_byte: bool = False) -> None:
    """Draw the losses of runs, by name, from the lines of their metrics.jsonl.

    Args:
        runs: the lines of each.
        path: of the picture.
        per_byte: draw the held-out losses alone, in bits per byte, which other tokenizers do not
            change.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, lines), color in zip(runs.items(), ("#1b7837", "#762a83"), strict=True):
        name, mean = escape_controls(name), f" (mean of {RECENT} steps)"
        train = [(x["tokens"], x["train_loss"]) for x in lines if x["train_loss"] is not None]
        held_out = "bits_per_byte" if per_byte else "val_loss"
        val = [(x["tokens"], x[held_out]) for x in lines if x.get(held_out) is not None]
        if train and not per_byte:
            tokens, losses = zip(*train, strict=True)
            axes.plot(tokens, recent_means(losses), color=color, label=f"{name}, training{mean}")
        if val:
            axes.plot(*zip(*val, strict=True), "o--", color=color, label=f"{name}, held out")
    unit = "bits per byte" if per_byte else "nats per token"
    axes.set(xlabel="tokens trained on", ylabel=f"loss ({unit})", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    with files.replacing(path) as new, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
        figure.savefig(new, dpi=150, format="png")
