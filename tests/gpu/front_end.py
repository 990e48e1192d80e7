"""Triton's front end on every kernel of the operators, in many combinations of their options.

The front end turns a kernel's Python into Triton's intermediate language and checks all types. It
needs no GPU, no assembler and no C compiler. Prints what failed as JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import stand_in_driver
import torch
import triton
import ysnake_kernels as ours
from covering import covering
from torch import Tensor
from triton._C.libtriton import ir
from ysnake_kernels.layers_step import layers_step
from ysnake_kernels.layers_step.inputs import LayerWeights
from ysnake_kernels.mixer import MixerSizes
from ysnake_kernels.mixer_step import MixerWeights

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
SCAN = {
    "dtype": FLOATS,
    # heads, groups, P, N
    "sizes": ((4, 1, 64, 128), (4, 2, 64, 256), (2, 1, 128, 128), (2, 2, 20, 17), (1, 1, 1, 1)),
    "ends": ("neither", "initial states", "final gradient", "both"),
    "gate": ("none", "contiguous", "slice"),
    "D": ("none", "head", "channel"),
    "sequences": ("plain", "documents", "packed"),
    # how much of the GPU is busy: decides between segments, and how heads share programs
    "load": ("full", "short", "segments"),
    "dt_bias": (False, True),
    "dt_softplus": (True, False),
    "dt_limit": ((0.0, float("inf")), (0.001, 0.1)),
    "dt_dtype": (None, torch.float32),  # None: that of x
    "parameters": (torch.float32, None),
    "index": INDICES,
}
MORE_SIZES = ((4, 2, 64, 64), (4, 1, 80, 96), (4, 2, 32, 16), (2, 1, 256, 256), (3, 3, 33, 100))
PRESENCE = ("ends", "gate", "D", "sequences", "load", "dt_bias")
CONV = {
    "dtype": FLOATS,
    "width": (4, 2, 3),
    "older": (0, 1),  # tokens of a step's state that no tap reads
    "layout": ("slice", "channels first", "channels last"),
    "bias": (True, False),
    "documents": (False, True),
    "ends": ("neither", "initial states", "final gradient", "both"),
    "activation": ("silu", None),
    "parameters": (torch.float32, None),
    "index": (None, *INDICES),
}
NORM = {
    "dtype": FLOATS,
    "gate": ("slice", "none", "contiguous"),
    "bias": (False, True),
    "norm_before_gate": (False, True),
    "features": ((128, 64), (96, 48), (16384, 16384), (3, 1)),  # and of a group
    "parameters": (torch.float32, None),
}
STEP = {
    "dtype": FLOATS,
    "sizes": ((64, 128), (64, 64), (20, 17), (256, 256), (1, 1)),
    "state": (torch.float32, None),
    "gate": (False, True),
    "D": ("none", "head", "channel"),
    "dt_bias": (True, False),
    "dt_softplus": (True, False),
    "dt_limit": ((0.0, float("inf")), (0.001, 0.1)),
    "layout": ("slice", "contiguous"),
    "parameters": (torch.float32, None),
    "index": (None, *INDICES),
}
LOSS = {"dtype": FLOATS, "vocab": (50, 4096, 9001, 1)}
LAYERS = {
    "dtype": (torch.bfloat16, torch.float32, torch.float64),  # float16 takes the other operators
    "sizes": ((2, 64, 128), (4, 20, 17), (300, 4, 16), (1, 1, 1)),  # heads, P, N
    "residual": (torch.float32, None),  # None: the dtype of the projections
    "bias": (False, True),
    "conv_bias": (True, False),
    "width": (4, 2),
    "dt_limit": ((0.0, float("inf")), (0.001, 0.1)),
    "layout": ("channels last", "channels first"),
    "parameters": (torch.float32, None),
}


class FrontEnd:
    """Stands for Triton's compiler: runs its front end and notes what fails, in which cases."""

    def __init__(self) -> None:
        self.case = ""
        self.kernels: dict[str, int] = {}
        self.failures: dict[tuple[str, str], list[str]] = {}

    def compile(self, src: Any, target: Any, options: dict, **_: Any) -> SimpleNamespace:
        backend = triton.compiler.make_backend(target)
        options = backend.parse_options(dict(options))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options)
        name = f"{src.fn.fn.__module__}.{src.fn.fn.__name__}"
        self.kernels[name] = self.kernels.get(name, 0) + 1
        try:
            src.make_ir(target, options, functions, backend.get_module_map(), context)
        except Exception as error:  # whatever it is, the other cases are of interest too
            self.note(name, error)
        return LAUNCHES_NOTHING

    def note(self, name: str, error: Exception) -> None:
        self.failures.setdefault((name, _innermost(error)), []).append(self.case)


class _LaunchesNothing(SimpleNamespace):
    """What Triton's launch asks of a compiled kernel."""

    def __getitem__(self, grid: tuple) -> Callable:
        return self.run


LAUNCHES_NOTHING = _LaunchesNothing(
    run=lambda *_: None, launch_metadata=lambda *_: None, function=0, packed_metadata=()
)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _activation(layout: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose last dimension is a slice of a projection, or that is contiguous."""
    if layout == "slice":
        return torch.zeros(*shape[:-1], shape[-1] + 8, dtype=dtype)[..., : shape[-1]]
    return torch.zeros(shape, dtype=dtype)


def _differentiate(outputs: list[Tensor], inputs: dict[str, Any]) -> None:
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(t) for t in outputs], allow_unused=True)


def _leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, of which the floating-point tensors want gradients."""
    return {
        k: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for k, t in inputs.items()
    }


def scan(
    dtype, sizes, ends, gate, D, sequences, load, dt_bias, dt_softplus, dt_limit, dt_dtype,
    parameters, index,
) -> None:  # fmt: skip
    heads, groups, P, N = sizes
    batch = 2 if sequences != "packed" and load != "segments" else 1
    length = {"full": 300, "short": 40, "segments": 4000}[load]
    kept = 2 if sequences == "packed" else batch
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    new = partial(torch.zeros, dtype=parameters or dtype)
    xBC = torch.zeros(batch, length, heads * P + 2 * groups * N, dtype=dtype)
    x, B, C = xBC.split([heads * P, groups * N, groups * N], -1)
    inputs = {
        "x": x.unflatten(-1, (heads, P)),
        "dt": _activation("slice", batch, length, heads, dtype=dt_dtype or dtype),
        "A": -new(heads),
        "B": B.unflatten(-1, (groups, N)),
        "C": C.unflatten(-1, (groups, N)),
        "D": {"none": None, "head": new(heads), "channel": new(heads, P)}[D],
        "dt_bias": new(heads) if dt_bias else None,
    }
    if gate != "none":
        inputs["z"] = _activation(gate, batch, length, heads * P, dtype=dtype).view_as(inputs["x"])
    if ends in ("initial states", "both"):
        inputs["initial_states"] = torch.zeros(kept, heads, P, N, dtype=exact)
    if sequences == "documents":
        inputs["seq_idx"] = torch.zeros(batch, length, dtype=index)
    if sequences == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, length // 3, length], dtype=index)
    inputs = _leaves(inputs)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    with stand_in_driver.fused_on_cpu(1 if load == "full" else stand_in_driver.MULTIPROCESSORS):
        y, states = ours.ssd_scan(**inputs, **options, return_final_states=True)
        _differentiate([y, states] if ends in ("final gradient", "both") else [y], inputs)


def conv(dtype, width, older, layout, bias, documents, ends, activation, parameters, index) -> None:
    batch, channels, length = 2, 40, 10
    if layout == "channels first":
        x = torch.zeros(batch, channels, length, dtype=dtype)
    else:
        layout = "slice" if layout == "slice" else "contiguous"
        x = _activation(layout, batch, length, channels, dtype=dtype).transpose(1, 2)
    parameters = parameters or dtype
    weight = torch.zeros(channels, width, dtype=parameters)
    shift = torch.zeros(channels, dtype=parameters) if bias else None
    states = torch.zeros(batch, channels, width - 1, dtype=dtype)
    before = torch.zeros(batch, channels, older + width - 1, dtype=dtype)
    with stand_in_driver.fused_on_cpu():
        inputs = {"x": x, "weight": weight, "bias": shift}
        if ends in ("initial states", "both"):
            inputs["initial_states"] = states
        if documents:
            inputs["seq_idx"] = torch.zeros(batch, length, dtype=index or torch.int32)
        inputs = _leaves(inputs)
        y, final = ours.causal_conv1d(**inputs, activation=activation, return_final_states=True)
        _differentiate([y, final] if ends in ("final gradient", "both") else [y], inputs)
        rows = None if index is None else torch.arange(batch).to(index)
        ours.causal_conv1d_step(x[..., 0], before, weight, shift, activation, rows)


def norm(dtype, gate, bias, norm_before_gate, features, parameters) -> None:
    features, group = features
    new = partial(torch.zeros, features, dtype=parameters or dtype)
    z = None if gate == "none" else _activation(gate, 3, features, dtype=dtype)
    inputs = {"x": torch.zeros(3, features, dtype=dtype), "weight": new(), "z": z}
    inputs = _leaves(inputs | {"bias": new() if bias else None})
    with stand_in_driver.fused_on_cpu():
        y = ours.rms_norm_gated(**inputs, group_size=group, norm_before_gate=norm_before_gate)
        _differentiate([y], inputs)


def step(
    dtype, sizes, state, gate, D, dt_bias, dt_softplus, dt_limit, layout, parameters, index
) -> None:
    batch, heads, groups, (P, N) = 2, 4, 2, sizes
    new = partial(torch.zeros, dtype=parameters or dtype)
    part = partial(_activation, layout, batch, dtype=dtype)
    x, BC = part(heads * P).unflatten(-1, (heads, P)), part(groups * N).unflatten(-1, (groups, N))
    with stand_in_driver.fused_on_cpu(), torch.no_grad():
        ours.ssd_step(
            torch.zeros(batch, heads, P, N, dtype=state or dtype),
            *(x, part(heads), -new(heads), BC, BC),
            D={"none": None, "head": new(heads), "channel": new(heads, P)}[D],
            z=x if gate else None,
            dt_bias=new(heads) if dt_bias else None,
            dt_softplus=dt_softplus,
            state_batch_indices=None if index is None else torch.arange(batch).to(index),
            dt_limit=dt_limit,
        )


def loss(dtype, vocab) -> None:
    with stand_in_driver.fused_on_cpu():
        ours.cross_entropy_(torch.zeros(3, vocab, dtype=dtype), torch.zeros(3, dtype=torch.int64))


def layers(dtype, sizes, residual, bias, conv_bias, width, dt_limit, layout, parameters) -> None:
    batch, d_model, (heads, P, N) = 2, 24, sizes
    s, new = MixerSizes(heads * P, heads, 1, N), partial(torch.zeros, dtype=dtype)
    of_heads = torch.zeros(heads, dtype=parameters or dtype)
    taps, shift = new(s.channels, width), new(s.channels) if conv_bias else None
    inner = taps, shift, of_heads, -of_heads, of_heads, new(s.d_inner)
    mixer, features = MixerWeights(*inner, s, dt_limit, 1e-5), sum(s.projection)
    into = new(features, d_model), new(features) if bias else None
    out = new(d_model, s.d_inner), new(d_model) if bias else None
    weights = LayerWeights(new(d_model), 1e-5, *into, mixer, *out)
    conv_state = new(batch, width - 1, s.channels).mT
    if layout == "channels first":
        conv_state = conv_state.contiguous()
    exact = torch.promote_types(dtype, torch.float32)
    states = [(conv_state, torch.zeros(batch, heads, P, N, dtype=exact))]
    h = torch.zeros(batch, d_model, dtype=residual or dtype)
    with stand_in_driver.fused_on_cpu():
        layers_step(h, states, [weights], new(d_model), 1e-5)


OPERATORS = {scan: SCAN, conv: CONV, norm: NORM, step: STEP, loss: LOSS, layers: LAYERS}


def cases(operator: Callable, thorough: bool) -> list[dict[str, Any]]:
    """Pairs of options; thoroughly, triples too, and of a scan all that may be present or not."""
    options = OPERATORS[operator]
    if thorough and operator is scan:
        options = options | {"sizes": options["sizes"] + MORE_SIZES}
    chosen = covering(options, 3 if thorough else 2)
    if thorough and operator is scan:
        usual = {name: values[0] for name, values in options.items()}
        present = product(*(options[name] for name in PRESENCE))
        chosen += [usual | dict(zip(PRESENCE, values, strict=True)) for values in present]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thorough", action="store_true", help="thousands of combinations")
    thorough = parser.parse_args().thorough
    stand_in_driver.activate(launches=False)
    front_end, tried = FrontEnd(), 0
    with patch.object(triton.compiler, "compile", front_end.compile):
        for operator in OPERATORS:
            for case in cases(operator, thorough):
                front_end.case = f"{operator.__name__} {case}"
                tried += 1
                try:
                    operator(**case)
                except Exception as error:  # of the code around the kernels
                    front_end.note(f"{operator.__name__}, outside its kernels", error)
    failures = [
        {"kernel": kernel, "error": error, "cases": len(where), "first": where[0]}
        for (kernel, error), where in front_end.failures.items()
    ]
    json.dump({"cases": tried, "kernels": front_end.kernels, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
