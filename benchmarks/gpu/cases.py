"""The operators that are checked and timed, their arguments, and the cases that must be right.

With small shapes everything here also works on a CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import ysnake_kernels as ours
from torch import Tensor

from benchmarks.traffic import Shape

OPTIONS = {
    "scan": {"dt_softplus": True},
    "convolution": {"activation": "silu"},
    "norm": {"norm_before_gate": False},
    "step": {"dt_softplus": True},
    "mixer": {"norm_before_gate": False},
}
TINY = Shape(batch=1, length=12, heads=2, head_dim=16, state=16)
FORWARD, BOTH = "forward", "forward + backward"


def operators(name: str) -> dict[str, Callable]:
    """Every operator of an implementation, by our names and with our arguments."""
    if name != "mamba_ssm":
        return {
            "scan": ours.ssd_scan,
            "convolution": ours.causal_conv1d,
            "norm": ours.rms_norm_gated,
            "step": ours.ssd_step,
            "mixer": ours.mamba_split_conv1d_scan_combined,
        }
    from mamba_ssm.ops.triton import layernorm_gated, selective_state_update, ssd_combined

    def convolution(x, weight, bias, **options):
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x, weight, bias, **options)

    def step(state, x, dt, A, B, C, D, dt_bias, **options):
        dt, dt_bias, D = (t[..., None].expand(*t.shape, x.shape[-1]) for t in (dt, dt_bias, D))
        update = selective_state_update.selective_state_update
        A = A[:, None, None].expand(state.shape[1:])
        return update(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, **options)

    def mixer(A, D, zxbcdt, conv1d_weight, **rest):
        headdim = (zxbcdt.shape[-1] - conv1d_weight.shape[0] - len(A)) // len(A)
        call = ssd_combined.mamba_split_conv1d_scan_combined
        tensors = {"zxbcdt": zxbcdt, "conv1d_weight": conv1d_weight, "A": A, "D": D}
        return call(**tensors, chunk_size=256, headdim=headdim, **rest)

    return {
        "scan": partial(ssd_combined.mamba_chunk_scan_combined, chunk_size=256),
        "convolution": convolution,
        "norm": partial(layernorm_gated.rmsnorm_fn, bias=None),
        "step": step,
        "mixer": mixer,
    }


def arguments(
    s: Shape, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """The arguments of each operator: slices of one projection, and parameters in float32.

    If `dtype` is float64, the parameters are in float64 too.
    """
    d_inner, n = s.heads * s.head_dim, s.groups * s.state
    channels = d_inner + 2 * n
    torch.manual_seed(s.length + seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    randn = partial(torch.randn, device=device, dtype=exact)
    zxbcdt = randn(s.batch, s.length, d_inner + channels + s.heads).to(dtype)
    z, xBC, dt = zxbcdt.split([d_inner, channels, s.heads], -1)
    weight, bias, gain = randn(channels, 4) / 2, randn(channels), randn(d_inner)
    heads = {"A": -torch.rand(s.heads, device=device, dtype=exact) - 0.5, "D": randn(s.heads)}
    heads["dt_bias"] = randn(s.heads) - 3
    x, B, C = xBC.contiguous().split([d_inner, n, n], -1)
    x = x.unflatten(-1, (s.heads, -1))
    B, C = (t.unflatten(-1, (s.groups, -1)) for t in (B, C))
    scan = {"x": x, "dt": dt, "B": B, "C": C, **heads}
    one = {k: t[:, 0] if k in ("x", "dt", "B", "C") else t for k, t in scan.items()}
    conv = {"conv1d_weight": weight, "conv1d_bias": bias, "rmsnorm_weight": gain}
    return {
        "scan": scan,
        "convolution": {"x": xBC.transpose(1, 2), "weight": weight, "bias": bias},
        "norm": {"x": randn(s.batch, s.length, d_inner).to(dtype), "weight": gain, "z": z},
        "step": {"state": randn(s.batch, s.heads, s.head_dim, s.state), **one},
        "mixer": {"zxbcdt": zxbcdt, **heads, **conv},
    }


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    name: str
    op: str
    tensors: dict[str, Tensor]
    options: dict


def names(dry: bool) -> list[str]:
    """The names of all cases, for `case`."""
    plain = ["scan", "convolution", "norm", "step", "mixer"]
    forms = [
        *("gate, states", "initial states only", "final states only", "documents"),
        *("documents, initial states", "packed", "packed, initial states", "skip per channel"),
    ]
    sizes = ["state 64", "state 256", "head 16", "odd lengths", "one token"]
    mixers = ["initial states only", "final states only", "documents, states"]
    if dry:
        forms, sizes, mixers = forms[1:3], [], mixers[2:]
    scans = [f"scan, {form}" for form in [*forms, *sizes]]
    return plain + scans + [f"mixer, {form}" for form in mixers]


def case(name: str, dtype: torch.dtype, device: str, dry: bool) -> Case:
    """The case with one of these `names`. Its tensors lie on the device."""
    op, _, form = name.partition(", ")
    s = replace(TINY, groups=2) if dry else Shape(2, 200, heads=8, groups=2)
    changes = {
        "state 64": {"state": 64},
        "state 256": {"state": 256, "head_dim": 128},
        "head 16": {"head_dim": 16, "state": 16},
        "odd lengths": {"length": 333, "state": 80, "head_dim": 40},
        "one token": {"length": 1},
    }
    s = replace(s, **changes.get(form, {}))
    tensors, options = dict(arguments(s, dtype, device)[op]), dict(OPTIONS[op])
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    randn = partial(torch.randn, device=device, dtype=exact)
    if "packed" in form:
        tensors = {k: t[:1] if t.ndim > 2 else t for k, t in tensors.items()}
        bounds = [0, s.length // 3, s.length]
        tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    if "documents" in form:
        second = torch.arange(s.length, device=device) >= s.length // 3
        tensors["seq_idx"] = second.int().expand(s.batch, -1).contiguous()
    if "gate" in form:
        tensors["z"] = torch.randn_like(tensors["x"])
    if "skip" in form:
        tensors["D"] = randn(s.heads, s.head_dim)
    if form in ("gate, states", "documents, states") or "initial" in form:
        tensors["initial_states"] = randn(s.batch, s.heads, s.head_dim, s.state)
        if op == "mixer":
            channels = len(tensors["conv1d_weight"])
            tensors["conv_initial_states"] = randn(s.batch, channels, 3).to(dtype)
    if op == "mixer":
        options["ngroups"] = s.groups
    final = ("gate, states", "documents, states", "final states only", "documents", "packed")
    if form in final:
        options["return_final_states"] = True
    return Case(name, op, tensors, options)


def compare(c: Case, dtype: torch.dtype, against: str, slack: float = 1) -> dict:
    """Compare the fused operator with another implementation in float64: a row of distances."""
    from comparison import TOLERANCES, distance, outputs_and_gradients

    forward, backward = TOLERANCES[dtype]

    def run(tensors: dict, weights: list | None) -> tuple:
        call = partial(operators("fused")[c.op], **c.options)
        if c.op != "step":
            return outputs_and_gradients(call, tensors, {}, weights)
        state = tensors["state"].clone()
        return [call(**tensors | {"state": state}), state], {}, None

    exact = {k: t.double() if t.is_floating_point() else t for k, t in c.tensors.items()}
    with ours.backend("fused"):
        outputs, gradients, weights = run(c.tensors, None)
    with ours.backend(against):
        expected, slopes, _ = run(exact, weights)
    out = max(map(distance, outputs, expected))
    far = {k: distance(g, slopes[k]) for k, g in gradients.items()} or {"-": 0.0}
    farthest = max(far, key=far.get)
    right = out <= slack * forward and far[farthest] <= slack * backward
    row = {"case": c.name, "dtype": str(dtype)[6:], "against": against, "output": finite(out)}
    return row | {"farthest": farthest, "gradient": finite(far[farthest]), "right": right}


def finite(number: float) -> float:
    """The number, or 1e300 in place of one that JSON cannot hold."""
    return number if math.isfinite(number) else 1e300


def work(
    name: str, op: str, mode: str, tensors: dict, context: str | None = None
) -> Callable[[], object]:
    """A call of an operator. With mode BOTH it also computes the gradients of all arguments."""
    operator = partial(operators(name)[op], **OPTIONS[op])
    leaves = {k: t.detach().requires_grad_(mode == BOTH) for k, t in tensors.items()}
    chosen = context or ("fused" if name == "mamba_ssm" else name)
    dy = None

    def call() -> None:
        nonlocal dy
        with ours.backend(chosen):
            y = operator(**leaves)
            if mode == BOTH:
                if dy is None:
                    dy = torch.randn_like(y)
                torch.autograd.grad(y, list(leaves.values()), dy)

    return call
