"""What benchmarks.gpu has measured, as Markdown and as pictures."""

from collections.abc import Iterable
from pathlib import Path


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _times(result: dict, names: list[str]) -> str:
    calls: dict[tuple, dict] = {}
    for row in result["times"]:
        key = (row["operator"], row["mode"], row["batch"], row["length"])
        calls.setdefault(key, {})[row["by"]] = row
    lines = []
    for key, by in calls.items():
        rows = [by.get(name, {}) for name in names]
        times = [f"{r['seconds'] * 1e3:.3f}" if "seconds" in r else "-" for r in rows]
        peaks = [f"{r['peak'] / 2**20:.0f}" if r.get("peak") is not None else "-" for r in rows]
        near = ["-", "-"]
        if "seconds" in (fused := by["fused"]):
            near = [f"{fused['bandwidth'] / 1e9:.3g}", f"{fused['share']:.1%}"]
        lines.append([*key, *times, *near, *peaks])
    head = ["operator", "mode", "batch", "length", *(f"{n} ms" for n in names)]
    head += ["fused GB/s", "of a copy", *(f"{n} MiB" for n in names)]
    return table(head, lines)


def markdown(result: dict, names: list[str]) -> str:
    """The whole report."""
    speed = result["copy_bandwidth"] / 1e9
    checks = [
        [c["case"], c["dtype"], f"{c['output']:.1e}", f"{c['gradient']:.1e}", c["farthest"],
         "yes" if c["right"] else "NO"]
        for c in result["checks"]
    ]  # fmt: skip
    first = [
        [f["by"], *((f"{f['empty']:.2f}", f"{f['filled']:.2f}", f["kernels"])
                    if "empty" in f else (f["failed"], "-", "-"))]
        for f in result["first_call"]
    ]  # fmt: skip
    failed = [r for r in result["times"] if "failed" in r]
    parts = [
        f"# {result['card']}\n",
        f"torch {result['torch']}, Triton {result['triton']}; a copy moves {speed:.0f} GB/s; "
        f"took {result['took']:.0f} s. Times in bfloat16; "
        f"{result['shape']}; MiB are the most that a call needs besides its arguments.\n",
        "## Against the reference in float64\n",
        table(["case", "dtype", "outputs", "gradients", "farthest", "within"], checks),
        "## First forward and backward of a new process, seconds\n",
        table(["by", "nothing compiled", "all compiled", "kernels"], first),
        "## Times\n",
        _times(result, names),
        *(f"- {r['by']}, {r['operator']}, {r['mode']}, batch {r['batch']}, length {r['length']}: "
          f"{r['failed']}" for r in failed),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def pictures(result: dict, names: list[str], out: Path) -> None:
    """times.png and bandwidth.png; the last point of a line is the long prompt of batch 1."""
    import matplotlib.pyplot as plt

    rows = [r for r in result["times"] if "seconds" in r and r["operator"] != "step"]
    card = result["card"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, operator in zip(axes, ("scan", "mixer"), strict=True):
        for name in names:
            line = [r for r in rows if (r["operator"], r["by"]) == (operator, name)]
            line = [r for r in line if r["mode"] != "forward"]
            per = [r["seconds"] * 1e9 / (r["batch"] * r["length"]) for r in line]
            axis.loglog([r["length"] for r in line], per, "o-", label=name)
        axis.set(title=f"{operator}, forward + backward", xlabel="length")
    axes[0].set_ylabel("ns per token")
    axes[0].legend()
    figure.suptitle(card)
    figure.savefig(out / "times.png", dpi=120, bbox_inches="tight")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, mode in zip(axes, ("forward", "forward + backward"), strict=True):
        for operator in dict.fromkeys(r["operator"] for r in rows):
            key = (operator, mode, "fused")
            line = [r for r in rows if (r["operator"], r["mode"], r["by"]) == key]
            share = [100 * r["share"] for r in line]
            axis.semilogx([r["length"] for r in line], share, "o-", label=operator)
        axis.set(title=mode, xlabel="length", ylim=(0, None))
    axes[0].set_ylabel("% of the bandwidth of a copy")
    axes[0].legend()
    figure.suptitle(card)
    figure.savefig(out / "bandwidth.png", dpi=120, bbox_inches="tight")
