"""Draws docs/sweep.png: what one program of the fused scan does with its tokens, and how segments
run side by side. Run as `python docs/draw_sweep.py`.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

INSIDE, STATE, LIGHT = "#f2a33c", "#3c78c8", "#cfdff5"
CHUNKS, TOKENS = 4, 4


def matrix(ax) -> None:
    """The map from inputs j to outputs i: products inside a chunk, the state below the diagonal."""
    n = CHUNKS * TOKENS
    for i in range(n):
        for j in range(i + 1):
            color = INSIDE if i // TOKENS == j // TOKENS else LIGHT
            ax.add_patch(Rectangle((j, n - 1 - i), 1, 1, facecolor=color, edgecolor="white"))
    for k in range(1, CHUNKS):
        size = k * TOKENS
        corner = (0, n - (k + 1) * TOKENS)
        ax.add_patch(Rectangle(corner, size, TOKENS, fill=False, edgecolor=STATE, linewidth=2))
        ax.text(size / 2, corner[1] + TOKENS / 2, "C  S", ha="center", va="center", color=STATE)
    ax.text(n * 0.62, n * 0.86, "(C Bᵀ · L) x\ninside a chunk", color="#a8660a", va="center")
    ax.text(n / 2, -1.2, "token j, read", ha="center")
    ax.text(-1.2, n / 2, "token i, written", va="center", rotation=90)
    ax.set(xlim=(-2, n + 2), ylim=(-2, n + 0.5), aspect="equal", title="The map, cut into chunks")
    ax.axis("off")


def row(ax, y: float, first: int, count: int, label: str, outputs: bool) -> None:
    """Chunks that a program walks from left to right with the state in registers."""
    for k in range(count):
        x = first + k
        color = INSIDE if outputs else LIGHT
        ax.add_patch(Rectangle((x + 0.15, y), 0.7, 0.5, facecolor=color, edgecolor="black"))
        if k < count - 1:
            ax.add_patch(arrow((x + 0.85, y + 0.25), (x + 1.15, y + 0.25), STATE))
        ax.add_patch(arrow((x + 0.5, y - 0.3), (x + 0.5, y), "black"))
        if outputs:
            ax.add_patch(arrow((x + 0.5, y + 0.5), (x + 0.5, y + 0.8), "black"))
    if label:
        ax.text(first - 0.15, y + 0.25, label, ha="right", va="center")


def arrow(start, end, color) -> FancyArrowPatch:
    return FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=color)


def sweeps(ax) -> None:
    """One pass; and the same in segments."""
    row(ax, 4.6, 0, 8, "one pass", outputs=True)
    ax.text(4, 5.65, "y out", ha="center")
    ax.text(4, 4.05, "x, dt, B, C in, once", ha="center")
    ax.text(8.1, 4.85, "S", color=STATE, va="center")
    for first in (0, 4):
        row(ax, 2.4, first, 4, "1  ends" if first == 0 else "", outputs=False)
        row(ax, 0.0, first, 4, "3  pass" if first == 0 else "", outputs=True)
    ax.plot([4, 4], [-0.5, 3.2], color="grey", linestyle=":")
    ax.text(2, 3.1, "segment 0", ha="center", color="grey")
    ax.text(6, 3.1, "segment 1", ha="center", color="grey")
    ax.text(-0.15, 1.5, "2  combine", ha="right", va="center")
    ax.add_patch(arrow((3.85, 2.4), (4.2, 0.5), STATE))
    ax.text(4.3, 1.5, "S = whole · S + end", color=STATE, va="center")
    ax.set(xlim=(-1.9, 8.5), ylim=(-0.6, 6.0), title="The sweep, whole and in segments")
    ax.axis("off")


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=[1, 1.6])
    matrix(axes[0])
    sweeps(axes[1])
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "sweep.png", dpi=110)


if __name__ == "__main__":
    main()
