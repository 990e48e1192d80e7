"""`python -m benchmarks.profile [--out FILE]`: where a training step, a scan and a prefill of ours
spend their time: in matrix products, in passes over memory, or between operators.

Shapes and limits are those of `benchmarks.compare`. A limit is the time of the matrix products
alone, each computed once.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import contestants
from benchmarks.compare import SCAN, SMALL, machine, preset
from benchmarks.memory import writable

REPEAT = 9
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv_", "dot")
PRODUCTS += ("_linear_pointwise",)
VIEWS = ("view", "slice", "select", "as_strided", "transpose", "permute", "expand", "unbind", "t")
VIEWS += ("split", "unflatten", "reshape", "alias", "detach", "empty", "unsqueeze", "squeeze")


def cases(folder: Path) -> Iterator[tuple[str, Callable, Callable | None]]:
    """Each name, the work to profile, and the limit or None."""
    for batch, length in ((8, 256), (2, 1024)):
        step = contestants.step_ysnake(str(folder / "small"), SMALL, batch, length)
        limit = contestants.step_limit(SMALL, batch, length)
        yield f"training step, {batch} x {length:,} tokens", step, limit
    scan = contestants.scan_ysnake(**SCAN)
    yield "scan, forward and backward", scan, contestants.scan_limit(**SCAN)
    read = contestants.prefill_ysnake(str(folder / "large"), preset("ys-71m"), 512)
    yield "prefill, 71M parameters, 512 tokens", read, None


def measure(work: Callable, limit: Callable | None) -> dict:
    """Milliseconds of a repetition: in all, of each kind, the limit, the longest operators."""
    for _ in range(2):
        work()
        if limit:
            limit()
    times, limits = [], []
    for _ in range(REPEAT):
        times.append(_milliseconds(work))
        if limit:
            limits.append(_milliseconds(limit))
    with profile(activities=[ProfilerActivity.CPU]):
        work()  # the first time under the profiler is slower
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        profiled_whole = statistics.mean(_milliseconds(work) for _ in range(REPEAT))
    operators, kinds = {}, {"products": 0.0, "passes": 0.0}
    for event in profiled.key_averages():
        name = event.key.rpartition("::")[2]
        if "::" not in event.key or name in VIEWS:
            continue
        spent = event.self_cpu_time_total / 1e3 / REPEAT
        kinds["products" if name in PRODUCTS else "passes"] += spent
        operators[name] = (spent, event.count // REPEAT)
    most = sorted(operators.items(), key=lambda item: -item[1][0])[:10]
    return {
        **{"profiled": profiled_whole, **kinds, "between": profiled_whole - sum(kinds.values())},
        **{"whole": statistics.median(times), "most": most},
        **{"limit": statistics.median(limits) if limits else None},
    }


def _milliseconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=writable, default=Path(__file__).parent / "results/profile.md"
    )
    parser.add_argument(
        "--precision",
        choices=("highest", "medium"),
        default="highest",
        help="torch's matmul precision; medium rounds the factors of products to bfloat16",
    )
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.precision)
    products = "float32" if arguments.precision == "highest" else "16-bit products"
    m = machine(torch.get_num_threads())
    lines = ["# Where the time goes", "", "Made by `python -m benchmarks.profile`. "]
    lines[-1] += f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, "
    lines[-1] += f"{time.strftime('%Y-%m-%d')}; {REPEAT} repetitions, {products}. The profiler "
    lines[-1] += "takes time itself, most of it between operators."
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, work, limit in cases(Path(folder)):
            spent = measure(work, limit)
            new = ["", f"**{name}**", "", "| | ms | of the whole |", "| --- | --- | --- |"]
            for label, key, of in (
                ("under the profiler", "profiled", "profiled"),
                ("matrix products, some of them twice", "products", "profiled"),
                ("passes over memory", "passes", "profiled"),
                ("between operators", "between", "profiled"),
                ("without the profiler", "whole", "whole"),
                ("limit: the products by themselves", "limit", "whole"),
            ):
                if (value := spent[key]) is not None:
                    new.append(f"| {label} | {value:.0f} | {value / spent[of]:.2f} |")
            most = (f"{op} {ms:.0f} ({count})" for op, (ms, count) in spent["most"])
            new += ["", f"Operators, ms (calls): {', '.join(most)}."]
            print("\n".join(new), flush=True)
            lines += new
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
