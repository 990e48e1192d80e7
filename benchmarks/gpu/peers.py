"""Stage `peers`: our scan and mixer and those of mamba_ssm, in one process, on the same tensors.

mamba_ssm tries 110 configurations of its kernels at the first call. Here many processes compile
them before that. Each trial then takes 20 milliseconds.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu import cases, train
from benchmarks.gpu.cases import BOTH, FORWARD, TINY, arguments
from benchmarks.gpu.common import Options, reason, seconds
from benchmarks.traffic import Shape


def shapes(dry: bool) -> list[Shape]:
    return [replace(TINY, length=32)] if dry else [Shape(), Shape(1, 32768)]


def make_importable(options: Options) -> None:
    """Put the folder of --peers on the path, and make mamba_ssm's trials shorter."""
    if options.peers:
        sys.path.insert(0, str(options.peers))
    from triton import testing
    from triton.runtime.autotuner import Autotuner

    def benchmark(self: Autotuner):
        return lambda call, quantiles: testing.do_bench(call, 5, 20, quantiles=quantiles)

    Autotuner.do_bench = property(benchmark)
    if options.dry:  # takes the first configuration, since trials need a card
        torch.cuda.device = lambda index: nullcontext()
        run_tuned = Autotuner.run

        def run_first(self: Autotuner, *args, **kwargs):
            self.configs = self.configs[:1]
            return run_tuned(self, *args, **kwargs)

        Autotuner.run = run_first


def run(job: str, options: Options) -> None:
    make_importable(options)
    if job == "compile":
        return compile_all(options)
    for row in times(job, options):
        options.write("peers", **row)


def times(op: str, options: Options) -> Iterator[dict]:
    for s in shapes(options.dry):
        for mode in (FORWARD,) if options.dry else (FORWARD, BOTH):
            for by in ("mamba_ssm", "fused"):
                row = {"operator": op, "mode": mode, "by": by}
                row |= {"batch": s.batch, "length": s.length}
                try:
                    given = arguments(s, torch.bfloat16, options.device)[op]
                    call = cases.work(by, op, mode, given)
                    call()
                    yield row | {"seconds": seconds([call], options.device, 0.3)}
                except Exception as error:
                    yield row | {"failed": reason(error)}


def compile_all(options: Options) -> None:
    """Compile all configurations of all kernels in many processes. Nothing is launched."""
    context = multiprocessing.get_context("fork")
    began = time.monotonic()
    workers = [
        context.Process(target=compile_share, args=(i, options)) for i in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    options.write("peers", compiled=time.monotonic() - began, codes=[w.exitcode for w in workers])


def compile_share(share: int, options: Options) -> None:
    from triton.runtime.autotuner import Autotuner

    number = 0

    def compile_some(self: Autotuner, *args, grid, warmup, **kwargs) -> None:
        nonlocal number
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            number += 1
            if number % options.processes == share:
                try:
                    self.fn.run(*args, grid=grid, warmup=True, **kwargs, **config.all_kwargs())
                except Exception as error:  # for instance too large for the card
                    print(reason(error), file=sys.stderr)
        self.nargs, self.best_config = None, self.configs[0]  # callers read both

    Autotuner.run = compile_some

    def layer(op: str) -> None:
        given = arguments(Shape(), torch.bfloat16, options.device)[op]
        cases.work("mamba_ssm", op, BOTH, given)()

    def model(size: str) -> None:
        """Compile the kernels of a model. Under autocast they get other dtypes than in `layer`."""
        sizes = train.SIZES[size] | {"n_layers": 1, "vocab_size": 64}
        built, loss_of = train.contestant("transformers, mamba_ssm", sizes, options)
        for batch, length in train.BATCHES[size]:
            train.step_of(built, loss_of, batch, length, False, options)[0]()

    works = {f"a model, {size}": partial(model, size) for size in ("130m", "ys-24m")}
    for name, work in ({op: partial(layer, op) for op in ("scan", "mixer")} | works).items():
        try:
            work()
        except Exception as error:
            if share == 0:
                options.write("peers", job=f"compile {name}", failed=reason(error))
