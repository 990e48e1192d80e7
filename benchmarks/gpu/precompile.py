"""Stage `precompile`: many processes make the launches of later stages, to fill Triton's cache.

The launches are real, so later launches find their kernels in the cache. A dry run compiles some
kernels for sm_90 and launches them on a stand-in for the driver.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import ysnake_kernels as ours

from benchmarks.gpu import cases, check, small, sweep, train
from benchmarks.gpu import layers as layers_of
from benchmarks.gpu.cases import BOTH, FORWARD, OPTIONS, TINY, arguments
from benchmarks.gpu.common import Options, reason
from benchmarks.traffic import Shape

Task = tuple[str, Callable[[], object]]


def tasks(job: str, options: Options) -> list[Task]:
    """All tasks of a job. Those that may share kernels with others come last."""
    dry, device = options.dry, options.device

    def of_shape(op: str, mode: str, s: Shape, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: cases.work("fused", op, mode, arguments(s, dtype, device)[op])()

    def of_case(name: str, dtype: torch.dtype) -> Callable[[], object]:
        def call() -> None:
            c = cases.case(name, dtype, device, dry)
            leaves = {
                k: t.detach().requires_grad_(t.is_floating_point() and c.op != "step")
                for k, t in c.tensors.items()
            }
            out = cases.operators("fused")[c.op](**leaves, **c.options)
            outs = [out] if isinstance(out, torch.Tensor) else list(out)
            if c.op != "step":
                torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])

        return call

    def of_model(form: str) -> Callable[[], object]:
        return lambda: next(work for name, work in check.model(options) if name == form)()

    if dry:
        op, mode = ("scan", BOTH) if job == "checks" else ("step", FORWARD)
        return [(op, of_shape(op, mode, TINY, torch.bfloat16))]

    def layers(*shapes: Shape) -> list[Task]:
        return [
            (f"{op} {s.batch} x {s.length}", of_shape(op, BOTH, s, torch.bfloat16))
            for s in shapes
            for op in OPTIONS
            if op != "step"
        ]

    if job == "layers":
        return layers_of.tasks(device)
    found = layers(Shape(), Shape(1, 32768))
    if job == "sweep":
        found += layers(replace(Shape(), state=64)) + models(device) + sweep.tasks(device)
    else:
        found.append(("sanitizer", lambda: small.main("tiny")))
        found += [(f"model, {form}", of_model(form)) for form in check.FORMS]
        for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16):
            for batch, groups in check.LAYERS:
                one = partial(layers_of.compare, batch, groups, dtype, options)
                found.append((f"layers step of {batch}, {str(dtype)[6:]}", one))
            for name in cases.names(dry):
                found.append((f"{name}, {str(dtype)[6:]}", of_case(name, dtype)))
            if dtype != torch.bfloat16:
                for s in (Shape(1, 32768), Shape()):
                    found.append(
                        (f"scan 1 x {s.length}, {dtype}", of_shape("scan", BOTH, s, dtype))
                    )
                    found.append(
                        (f"mixer 1 x {s.length}, {dtype}", of_shape("mixer", BOTH, s, dtype))
                    )
        for dtype in (torch.bfloat16, torch.float32):
            s = Shape(1, check.LONG, heads=8)
            found.append((f"scan 1 x {s.length}, {dtype}", of_shape("scan", BOTH, s, dtype)))
    for batch in (1, 16, 64):
        s = Shape(batch, 1)
        found.append((f"step of {batch}", of_shape("step", FORWARD, s, torch.bfloat16)))
    return found + layers(Shape(64, 512), Shape(2, 16384), Shape(1, 131072))


def models(device: str) -> list[Task]:
    """A training step of each model with one layer, and a token at each batch size."""

    def task(name: str, dtype: torch.dtype) -> Callable[[], object]:
        def call() -> None:
            model, loss_of = train.ours(train.SIZES[name] | {"n_layers": 1})
            model = model.to(device, dtype)
            if dtype == torch.float32:
                ids = torch.zeros(4, 4096, dtype=torch.int64, device=device)
                with torch.autocast(device, torch.bfloat16):
                    loss = loss_of(model, ids, ids)
                loss.backward()
            for batch in (1, 16, 64):
                model.step(torch.zeros(batch, dtype=torch.int64, device=device))

        return call

    return [
        (f"{name}, {str(dtype)[6:]}", task(name, dtype))
        for name in ("130m", "ys-24m")
        for dtype in (torch.float32, torch.bfloat16)
    ]


def run(job: str, options: Options) -> None:
    """Let workers take the tasks. A worker whose CUDA context breaks ends; another starts."""
    if options.dry:
        return dry_run(job, options)
    todo = tasks(job, options)
    context = multiprocessing.get_context("fork")  # this process must not have used the card before
    following = context.Value("i", 0)
    began = time.monotonic()
    workers: list = []
    spare = options.processes + 8  # workers that may break, in all
    while True:
        workers = [w for w in workers if w.is_alive()]
        left = following.value < len(todo)
        if not workers and not (left and spare):
            break
        if left and spare and len(workers) < options.processes:
            spare -= 1
            worker = context.Process(target=take, args=(todo, following, options))
            worker.start()
            workers.append(worker)
        else:
            time.sleep(0.05)
    spent = round(time.monotonic() - began, 1)
    done = min(following.value, len(todo))
    options.write("precompile", tasks=done, of=len(todo), seconds=spent)
    if done < len(todo):
        raise RuntimeError(f"only {done} of {len(todo)} tasks: too many workers broke")


def take(todo: list[Task], following, options: Options) -> None:
    """Do tasks until none is left."""
    while True:
        with following.get_lock():
            i = following.value
            following.value += 1
        if i >= len(todo):
            return
        name, call = todo[i]
        start = time.monotonic()
        try:
            with ours.backend("fused"):
                call()
            torch.cuda.synchronize()
        except Exception as error:
            options.write("precompile", task=name, failed=reason(error))
            try:
                torch.cuda.synchronize()
            except Exception:
                os._exit(1)  # nothing repairs the context
        else:
            spent = time.monotonic() - start
            if spent > 8:
                options.write("precompile", task=name, slow=round(spent, 1))
        torch.cuda.empty_cache()


def dry_run(job: str, options: Options) -> None:
    """Compile the kernels of the tasks for sm_90, and launch them on a stand-in driver."""
    from stand_in_driver import gpu, missing

    if missing():
        raise RuntimeError(missing())
    with gpu() as launches:
        for name, call in tasks(job, options):
            call()
            options.write("precompile", task=name, launches=launches())
