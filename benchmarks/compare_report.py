"""The results of `benchmarks.compare` as files: compare.json, the same as tables in compare.md, and
pictures. They show speed and memory by sequence length, and decoding by context.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

YSNAKE, HF, GPT2 = "ysnake", "transformers Mamba2", "transformers GPT-2"
DROPIN, LIMIT = "transformers with our drop-in", "matrix products alone"
LIMIT_ONEDNN = f"{LIMIT}, oneDNN's where ysnake's are"
COLOURS = {YSNAKE: "#1b7837", HF: "#762a83", GPT2: "#3c78c8", DROPIN: "#f2a33c"}
COLOURS |= {LIMIT: "#888888", LIMIT_ONEDNN: "#bbbbbb"}


def read(folder: Path) -> dict[str, dict]:
    """The results in a folder, by case."""
    path = folder / "compare.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write(results: dict[str, dict], folder: Path) -> None:
    """Write all files anew."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "compare.md").write_text(markdown(results))
    for name, draw in PICTURES.items():
        if figure := draw(results):
            figure.savefig(folder / f"compare-{name}.png", dpi=150)


def cells(group: dict) -> list[list[str]]:
    """A group as rows of text, the names of the columns first."""
    quality = any("loss_per_byte" in row for row in group["rows"])
    memory = "memory added" if group["memory"] == "extra" else "peak memory"
    if quality:
        head = ["", "nats per byte", "parameters", "steps", "tokens/s", memory]
    else:
        head = ["", "tokens/s", "ms", memory, *(f"{base} / it" for base in group["bases"])]
    out = [head]
    for row in group["rows"]:
        if why := row.get("absent") or row.get("failed"):
            out.append([row["by"], f"{'absent' if 'absent' in row else 'failed'}: {why}"])
            out[-1] += [""] * (len(head) - 2)
            continue
        speed, size = f"{row['tokens_per_s']:,.0f}", f"{row[group['memory']] / 1e9:.2f} GB"
        if quality:
            out.append([row["by"], f"{row['loss_per_byte']:.4f}", f"{row['parameters']:,}"])
            out[-1] += [f"{row['steps']:,}", speed, size]
            continue
        if row["by"].startswith(LIMIT):
            size = ""  # the memory of its operands has no meaning here
        milliseconds = 1e3 * statistics.median(row["seconds"])
        name = row["by"] + (" (ANOTHER RESULT)" if row.get("differs") else "")
        out.append([name, speed, f"{milliseconds:,.{1 if milliseconds < 100 else 0}f}", size])
        for base in group["bases"]:
            out[-1].append(_ratio(*row["ratios"][base]) if base in row["ratios"] else "")
    return out


def _ratio(median: float, least: float, most: float) -> str:
    if least == most == 1:
        return ""
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def table(group: dict) -> Table:
    """A group, to be printed."""
    head, *rows = cells(group)
    out = Table(title=group["title"], title_justify="left")
    for i, name in enumerate(head):
        out.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def markdown(results: dict[str, dict]) -> str:
    """All groups as tables, each case with the machine that measured it."""
    lines = [
        "# ysnake and its peers",
        "",
        "Made by `python -m benchmarks.compare`. In all cases but `quality` the contestants take "
        "turns. In a turn each does its work twice, and the second time counts. Times and speeds "
        "are medians over the turns. "
        "`ysnake / it` says how many times as fast ysnake is: the times per token of a turn are "
        "divided, and the cell has the median of these ratios, the lowest and the highest. "
        "Everything is in float32 where nothing else is said. Matrix products are computed by "
        "`torch.mm` and `torch.bmm`. On CPUs with AVX2 or AVX-512 that are not Intel's, ysnake "
        "uses oneDNN in linear layers.",
    ]
    for case, result in results.items():
        m = result["machine"]
        peers = (f"{k} {m[k] or 'absent'}" for k in ("torch", "transformers", "llama-cpp-python"))
        lines += ["", f"## {case}", ""]
        lines += [f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, "]
        lines[-1] += f"{(m['memory'] or 0) / 1e9:.0f} GB; {', '.join(peers)}; {result['date']}; "
        lines[-1] += f"{result['repeat']} repetitions"
        lines[-1] += "; TINY SHAPES, figures without meaning" if result["quick"] else ""
        for group in result["groups"]:
            head, *rows = cells(group)
            lines += ["", f"**{group['title']}**", ""]
            lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _by_length(
    results: dict[str, dict],
    value: Callable[[dict], float],
    label: str,
    without: Sequence[str] = (),
) -> Any:
    """Of training steps, one line for each contestant."""
    groups = [g for case in ("step", "lengths") for g in results.get(case, {}).get("groups", [])]
    groups.sort(key=lambda group: group["shape"]["length"])
    lines: dict[str, list] = {}
    for group in groups:
        for row in group["rows"]:
            if "tokens_per_s" in row and row["by"] not in without:
                lines.setdefault(row["by"], []).append((group["shape"]["length"], value(row)))
    if not lines:
        return None
    figure, axes = _figure()
    for name, points in lines.items():
        style = "--" if name.startswith(LIMIT) else "o-"
        axes.plot(*zip(*points, strict=True), style, color=COLOURS[name], label=name, markersize=5)
    ticks = [group["shape"]["length"] for group in groups]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    tokens = {group["shape"]["batch"] * group["shape"]["length"] for group in groups}
    title = f"A training step of {' or '.join(f'{n:,}' for n in sorted(tokens))} tokens"
    axes.set(xlabel="sequence length, tokens", ylabel=label, title=title, ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def throughput(results: dict[str, dict]) -> Any:
    return _by_length(results, lambda row: row["tokens_per_s"], "tokens/s")


def memory(results: dict[str, dict]) -> Any:
    label, without = "peak resident memory, GB", [LIMIT, LIMIT_ONEDNN]
    return _by_length(results, lambda row: row["peak"] / 1e9, label, without)


def decoding(results: dict[str, dict]) -> Any:
    """Speed of writing and reading, in tokens a second, by the number of tokens before."""
    groups = results.get("context", {}).get("groups", [])
    if not groups:
        return None
    figure, axes = _figure()
    styles = {"reads": "s--", "writes": "o-"}
    for (verb, style), group in zip(styles.items(), groups, strict=True):
        lines: dict[str, list] = {}
        for row in group["rows"]:
            if "tokens_per_s" in row:
                name = row["by"].split(",")[0]
                lines.setdefault(name, []).append((row["context"], row["tokens_per_s"]))
        for name, points in lines.items():
            points = list(zip(*points, strict=True))
            axes.plot(*points, style, color=COLOURS[name], label=f"{name} {verb}", markersize=5)
    title = "The quick model: speed by length of the context"
    axes.set(xlabel="context, tokens", ylabel="tokens/s", title=title, xscale="log", yscale="log")
    axes.legend(frameon=False)
    return figure


def quality(results: dict[str, dict]) -> Any:
    """Held-out loss by minutes of training."""
    groups = results.get("quality", {}).get("groups", [])
    rows = [row for group in groups for row in group["rows"] if row.get("curve")]
    if not rows:
        return None
    figure, axes = _figure()
    for row in rows:
        points = list(zip(*row["curve"], strict=True))
        axes.plot(*points, "o-", color=COLOURS[row["by"]], label=row["by"], markersize=4)
    title = f"{rows[0]['parameters'] / 1e6:.1f}M parameters, the same minutes on the same text"
    axes.set(xlabel="minutes of training", ylabel="held-out loss, nats per byte", title=title)
    axes.legend(frameon=False)
    return figure


PICTURES = {"throughput": throughput, "memory": memory, "decoding": decoding, "quality": quality}
