"""The results in gpu.jsonl as Markdown, and the short summary at the end of a run."""

import json
from collections.abc import Iterable
from pathlib import Path


def rows(out: Path) -> list[dict]:
    """The rows written so far. A line that a kill has cut short is left out."""
    found = []
    for line in (out / "gpu.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    filled = [list(head), *map(list, lines)]
    filled.insert(1, ["---"] * len(filled[0]))
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in filled)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def stage_table(found: list[dict]) -> str:
    """All rows of a stage. The columns are their keys, in order of appearance."""
    keys = list(dict.fromkeys(key for row in found for key in row if key != "stage"))
    return table(keys, ([shown(row.get(key, "")) for key in keys] for row in found))


def is_result(row: dict) -> bool:
    return not {"begins", "took", "failed"} & set(row)


def markdown(found: list[dict]) -> str:
    """A table of the results of each stage, and a list of failures."""
    parts = []
    for stage in dict.fromkeys(row["stage"] for row in found):
        results = [row for row in found if row["stage"] == stage and is_result(row)]
        lines = [row["line"] for row in results if "line" in row]
        results = [row for row in results if "line" not in row]
        parts += [f"## {stage}\n", stage_table(results)] if results else []
        parts += ["```python", *lines, "```\n"] if lines else []
    failed = [json.dumps(row) for row in found if "failed" in row]
    return "\n".join([*parts, "## Failed\n", *(f"- {row}" for row in failed)]) + "\n"


def write(out: Path) -> None:
    (out / "gpu.md").write_text(markdown(rows(out)))


def summary(out: Path) -> str:
    """The most important results, in few lines."""
    found = rows(out)
    checks = [row for row in found if "right" in row]
    wrong = [row for row in checks if not row["right"]]
    failed = [row for row in found if "failed" in row and row not in wrong]
    took = {row["stage"]: row["took"] for row in found if "took" in row}
    lines = [f"{len(checks) - len(wrong)} of {len(checks)} checks right; seconds: {took}"]
    lines += [f"WRONG {json.dumps(row)}"[:400] for row in wrong[:12]]
    lines += [f"FAILED {json.dumps(row)}"[:400] for row in failed[:12]]
    lines += [row["line"] for row in found if "line" in row]
    return "\n".join([*lines, *against_peers(found)])


def against_peers(found: list[dict]) -> list[str]:
    """Lines that compare speed with mamba_ssm, and tokens per second of training steps."""
    times: dict[tuple, dict[str, float]] = {}
    for row in found:
        if row["stage"] == "peers" and "seconds" in row:
            key = (row["operator"], row["mode"], row["batch"], row["length"])
            times.setdefault(key, {})[row["by"]] = row["seconds"]
    lines = [
        f"{operator} {mode} {batch} x {length}: {by['fused'] * 1e3:.3f} ms, "
        f"{by['mamba_ssm'] / by['fused']:.2f} times mamba_ssm"
        for (operator, mode, batch, length), by in times.items()
        if {"fused", "mamba_ssm"} <= set(by)
    ]
    for row in found:
        if row["stage"] == "train" and "seconds" in row:
            shape = f"{row['model']} {row['batch']} x {row['length']}"
            lines.append(f"{shape}, {row['by']}: {row['tokens per second']:.0f} tokens/s")
    return lines
