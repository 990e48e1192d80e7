"""`python -m benchmarks.compare [CASE...]`: the speed of ysnake and of the installed peers, here.

Each contestant runs in a process of its own, with the same shapes and the same weights. They take
turns, so other programs on this machine slow all of them alike. In its turn a contestant does its
work twice: the first time warms it up, the second time is measured. A ratio compares two times of
the same turn. One more contestant computes only the matrix products of a task, as a limit. Results,
tables and pictures go to benchmarks/results/.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from rich.progress import Progress, TaskID, TimeElapsedColumn
from tyro.conf import Positional, arg
from ysnake_kernels.native.matrix import FORMATS

from benchmarks import compare_report, quality
from benchmarks.compare_report import DROPIN, GPT2, HF, LIMIT, LIMIT_ONEDNN, YSNAKE
from ysnake.model.config import PRESETS, model_config
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training import memory
from ysnake.training.options import MODEL_SIZES, Settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Case = Literal["scan", "step", "lengths", "prefill", "decode", "context", "quality"]
DISAGREE = 1e-3  # a larger relative difference of results is more than rounding
LLAMA = "llama.cpp"


@dataclass
class Options:
    """Compare ysnake with its peers on this machine, and with the speed of matrix products."""

    cases: Positional[Annotated[tuple[Case, ...], arg(metavar="CASE...")]] = ()
    """Cases: scan, step (a training step), lengths (the same at more sequence lengths), prefill,
    decode, context (speed and memory by length of the context). By default all of these. The case
    quality (training for the same time on the same text) runs only if it is named."""
    repeat: int = 5
    """Timed repetitions of each contestant."""
    threads: int = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    """Threads of each contestant; by default as many as there are cores."""
    quick: bool = False
    """Tiny shapes, to see whether it runs. The figures mean nothing, and only --out keeps them."""
    rounded: bool = False
    """Measure each contestant that uses torch twice: in float32, and with the factors of its matrix
    products rounded to bfloat16 (torch's matmul precision medium). For CPUs with such products."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder of the results; by default benchmarks/results. Cases that do not run keep theirs."""
    text: Annotated[Path | None, arg(metavar="FILE")] = None
    """For quality: a text of several megabytes."""
    minutes: float = 10.0
    """For quality: how long each contestant trains."""
    lr: float = 2e-3
    """For quality: the highest learning rate."""


@dataclass(frozen=True)
class Contestant:
    """One row of a group: a function of benchmarks.contestants with its arguments."""

    name: str
    function: str
    tokens: int  # in a repetition
    arguments: dict
    needs: tuple[str, ...] = ()  # modules that must be installed
    precision: str = "highest"  # torch's matmul precision


@dataclass(frozen=True)
class Group:
    """Contestants that take turns. The others are compared with those in `bases`."""

    title: str
    contestants: list[Contestant]
    bases: tuple[str, ...] = (YSNAKE,)
    memory: str = "peak"  # or "extra": without the memory in use before the first repetition
    shape: dict[str, int] = field(default_factory=dict)


def preset(name: str) -> dict[str, int]:
    """Sizes of a preset's model with the largest vocabulary that the preset allows."""
    settings = Settings(**PRESETS[name].settings)
    config = model_config(settings, PRESETS[name].max_vocab, 0)
    return {size: getattr(config, size) for size in ("vocab_size", *MODEL_SIZES)}


TINY = {"vocab_size": 512, "d_model": 64, "n_layers": 2, "d_state": 16, "head_dim": 16}
SMALL = {"vocab_size": 8192, "d_model": 384, "n_layers": 4, "d_state": 128, "head_dim": 64}
SCAN = {"batch": 2, "length": 1024, "heads": 24, "head_dim": 64, "d_state": 128}


def scan(folder: Path, options: Options) -> Iterator[Group]:
    """Forward and backward of the scan alone."""
    shape = SCAN
    if options.quick:
        shape = {"batch": 1, "length": 128, "heads": 4, "head_dim": 16, "d_state": 16}
    tokens = shape["batch"] * shape["length"]
    contestants = [
        Contestant(YSNAKE, "scan_ysnake", tokens, shape),
        Contestant(HF, "scan_transformers", tokens, shape, ("transformers",)),
        Contestant(LIMIT, "scan_limit", tokens, shape),
    ]
    title = "Scan, forward + backward, {batch} x {length} tokens, {heads} heads".format(**shape)
    yield Group(title, contestants, memory="extra", shape=shape)


def step(folder: Path, options: Options) -> Iterator[Group]:
    """Forward and backward of a training step."""
    for batch, length in [(2, 32)] if options.quick else [(8, 256), (2, 1024)]:
        yield _training(folder, options, batch, length)


def lengths(folder: Path, options: Options) -> Iterator[Group]:
    """The same number of tokens in longer and shorter sequences."""
    for batch, length in [(1, 64)] if options.quick else [(16, 128), (4, 512), (1, 2048)]:
        yield _training(folder, options, batch, length)


def _training(folder: Path, options: Options, batch: int, length: int) -> Group:
    shape = {"sizes": TINY if options.quick else SMALL, "batch": batch, "length": length}
    here = shape | {"folder": str(folder / "small")}
    tokens, needs = batch * length, ("transformers",)
    contestants = [
        Contestant(YSNAKE, "step_ysnake", tokens, here),
        Contestant(HF, "step_transformers", tokens, here, needs),
        Contestant(DROPIN, "step_transformers", tokens, here | {"dropin": True}, needs),
        Contestant(GPT2, "step_gpt2", tokens, shape, needs),
        Contestant(LIMIT, "step_limit", tokens, shape),
        Contestant(LIMIT_ONEDNN, "step_limit", tokens, shape | {"onednn": True}),
    ]
    title = f"Training step, forward + backward, {batch} x {length} tokens"
    return Group(title, contestants, shape={"batch": batch, "length": length})


def prefill(folder: Path, options: Options) -> Iterator[Group]:
    """Reading a prompt, to its last logits."""
    length, sizes = (32, TINY) if options.quick else (512, preset("ys-71m"))
    here = {"folder": str(folder / "large"), "sizes": sizes, "length": length}
    contestants = [
        Contestant(YSNAKE, "prefill_ysnake", length, here),
        Contestant(HF, "prefill_transformers", length, here, ("transformers",)),
        Contestant(
            *(f"{LLAMA} F32", "prefill_llama", length),
            *(here | {"threads": options.threads}, ("llama_cpp", "gguf")),
        ),
    ]
    name = "tiny model" if options.quick else "71M parameters"
    yield Group(f"Prefill, {name}, {length} tokens", contestants)


def decode(folder: Path, options: Options) -> Iterator[Group]:
    """Generation token by token, with weights of each format, and for many sequences at once."""
    count, sizes = (4, TINY) if options.quick else (32, preset("ys-71m"))
    here = {"folder": str(folder / "large"), "sizes": sizes, "count": count, "context": 10}
    llama = here | {"threads": options.threads}
    needs, rows = ("llama_cpp", "gguf"), 2 if options.quick else 16
    many = f"{rows} at once"
    ours = {f"{YSNAKE} {weights}": {"weights": weights} for weights in FORMATS}
    ours |= {
        f"{YSNAKE} {weights}, --no-compile": {"weights": weights, "compile": False}
        for weights in ("float32", "int8")
    }
    ours |= {
        f"{YSNAKE} {weights}, {many}": {"weights": weights, "batch": rows} for weights in FORMATS
    }
    contestants = [
        *(
            Contestant(name, "decode_ysnake", more.get("batch", 1) * count, here | more)
            for name, more in ours.items()
        ),
        *(
            Contestant(
                f"{LLAMA} {type.upper()}", "decode_llama", count, llama | {"type": type}, needs
            )
            for type in ("f32", "bf16", "q8_0", "q4_0")
        ),
        Contestant(HF, "decode_transformers", count, here, ("transformers",)),
    ]
    name = "tiny model" if options.quick else "71M parameters"
    bases = [name for name in ours if not name.endswith(many)]
    yield Group(f"Decoding, {name}", contestants, tuple(bases))


def context(folder: Path, options: Options) -> Iterator[Group]:
    """How speed and memory depend on the length of the context."""
    sizes = TINY if options.quick else preset("quick")
    here = {"folder": str(folder / "context"), "sizes": sizes}
    read = [64, 128] if options.quick else [1024 * 4**k for k in range(5)]
    contestants = []
    for n in read:
        times = max(1, 8 * read[0] // n)
        arguments = here | {"context": n, "times": times}
        contestants.append(
            Contestant(f"{YSNAKE}, {n:,} tokens", "read_ysnake", n * times, arguments)
        )
    yield Group("Prefill of long prompts, `quick` model", contestants, (contestants[0].name,))

    count = 4 if options.quick else 64
    contestants = [
        Contestant(
            *(f"{YSNAKE}, context {n:,}", "decode_ysnake", count),
            here | {"context": n, "count": count},
        )
        for n in ([10, 100] if options.quick else [10, 1000, 100_000])
    ]
    base = contestants[0].name
    contestants += [
        Contestant(
            *(f"{HF}, context {n:,}", "decode_transformers", count),
            *(here | {"context": n, "count": count}, ("transformers",)),
        )
        for n in ([10] if options.quick else [10, 1000])
    ]
    yield Group("Decoding after a context, `quick` model", contestants, (base,))


def with_rounded(group: Group) -> Group:
    """The same group; each contestant that uses torch comes a second time with rounded products."""

    def named(name: str) -> str:
        return f"{name}, 16-bit products"

    more = [
        replace(each, name=named(each.name), precision="medium")
        for each in group.contestants
        if not each.name.startswith(LLAMA)
    ]
    bases = (*group.bases, *map(named, group.bases))
    return replace(group, contestants=[*group.contestants, *more], bases=bases)


class Failed(RuntimeError):
    """A contestant has ended too early. The message says why."""


class Worker:
    """A process that answers each line of its input with a line of JSON."""

    def __init__(self, module: str, job: dict, threads: int):
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by end()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(job)],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors},
            text=True,
            env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def answer(self) -> dict:
        """Its next answer."""
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        reason = "killed, perhaps because memory ran out" if code == -9 else "".join(lines[-1:])
        raise Failed(f"{reason or 'no reason given'} (exit code {code})")

    def repeat(self) -> dict:
        """Ask for one repetition."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; answer() says why
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure(group: Group, options: Options, show: Callable[[str], None]) -> list[dict]:
    """One row for each contestant: times, memory and ratios, or why there are none."""
    rows, workers = [], {}
    try:
        for i, each in enumerate(group.contestants):
            row = {"by": each.name, "tokens": each.tokens, "seconds": []}
            row["context"] = each.arguments.get("context")
            rows.append(row)
            if missing := [name for name in each.needs if find_spec(name) is None]:
                row["absent"] = f"{', '.join(missing)} not installed"
                continue
            show(f"starting {each.name}")
            job = {"function": each.function, "arguments": each.arguments}
            job["precision"] = row["precision"] = each.precision
            workers[i] = Worker("benchmarks.contestants", job, options.threads)
            if i == 0:  # it writes the weights, which the others read
                _ask(workers, i, row, workers[i].answer)
        for i in list(workers):
            if i:
                show(f"waiting for {rows[i]['by']}")
                _ask(workers, i, rows[i], workers[i].answer)
        for turn in range(options.repeat):
            for i in list(workers):
                show(f"{rows[i]['by']}, {turn + 1} of {options.repeat}")
                _ask(workers, i, rows[i], workers[i].repeat)
    finally:
        for worker in workers.values():
            worker.end()
    _compare(rows, group.bases)
    return rows


def _ask(workers: dict[int, Worker], i: int, row: dict, question: Callable[[], dict]) -> None:
    """Put the answer into the row. A contestant that fails is left out; the others go on."""
    try:
        answer = question()
    except Failed as error:
        row["failed"] = str(error)
        workers.pop(i).end()
        return
    if "seconds" in answer:
        row["seconds"].append(answer.pop("seconds"))
    row |= answer


def _compare(rows: list[dict], bases: tuple[str, ...]) -> None:
    """Add to each row how many times as fast each base is, and whether the results differ."""
    by_name = {row["by"]: row for row in rows if "failed" not in row and "absent" not in row}
    for row in by_name.values():
        row["tokens_per_s"] = row["tokens"] / statistics.median(row["seconds"])
        row["ratios"] = {}
        for base in bases:
            if base not in by_name:
                continue
            ours = by_name[base]
            ratios = [
                (theirs / row["tokens"]) / (mine / ours["tokens"])
                for mine, theirs in zip(ours["seconds"], row["seconds"], strict=True)
            ]
            row["ratios"][base] = [statistics.median(ratios), min(ratios), max(ratios)]
        exact = row["precision"] == "highest"
        if exact and row["norms"] and (expected := rows[0].get("norms")):
            far = [abs(a - b) / b for a, b in zip(row["norms"], expected, strict=True) if b]
            row["differs"] = any(not each <= DISAGREE for each in far)  # a NaN differs too


def machine(threads: int) -> dict:
    """The machine and the versions to which the figures belong."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in ("torch", "transformers", "llama-cpp-python"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": cpu[0] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": memory.available(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def main(argv: list[str]) -> int:
    """Measure as the command line says."""
    config = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, prog="python -m benchmarks.compare", args=argv, config=config)
    for name in ("repeat", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    out = options.out or (None if options.quick else RESULTS)
    names = options.cases or get_args(Case)[:-1]
    console, failed = cli.console(), False
    if not console.is_terminal:
        console.width = 140  # no table is cut, whatever shows the file
    results = compare_report.read(out) if out else {}
    bar = Progress(
        *("{task.description}", TimeElapsedColumn()),
        **{"console": console, "transient": True, "disable": not console.is_terminal},
    )
    task = bar.add_task("")
    with tempfile.TemporaryDirectory(prefix="ysnake-compare-") as scratch:
        for name in names:
            result = {"machine": machine(options.threads), "date": time.strftime("%Y-%m-%d")}
            result |= {"repeat": options.repeat, "quick": options.quick, "groups": []}
            with bar:
                for group in _groups(name, Path(scratch), options, bar, task):
                    result["groups"].append(group)
                    bar.update(task, description="")
                    console.print(compare_report.table(group))
                    failed |= any(row.get("differs") or "failed" in row for row in group["rows"])
            results[name] = result
            if out:
                compare_report.write(results, out)
    return cli.FAILED if failed else cli.DONE


def _groups(
    name: str, scratch: Path, options: Options, bar: Progress, task: TaskID
) -> Iterator[dict]:
    """The groups of a case, measured."""

    def show(what: str) -> None:
        bar.update(task, description=f"{name}: {what}")

    if name == "quality":
        sizes = TINY if options.quick else preset("quick")
        show("learning the vocabulary")
        corpus = quality.prepare(options.text, scratch / "text", sizes, options.quick)
        worker = partial(Worker, threads=options.threads)
        yield quality.measure(corpus, options.minutes, options.lr, worker, show)
        return
    for group in CASES[name](scratch, options):
        if options.rounded:
            group = with_rounded(group)
        rows = measure(group, options, show)
        about = {"title": group.title, "bases": group.bases, "memory": group.memory}
        yield about | {"shape": group.shape, "rows": rows}


CASES = {f.__name__: f for f in (scan, step, lengths, prefill, decode, context)}

if __name__ == "__main__":
    cli.run(main)
