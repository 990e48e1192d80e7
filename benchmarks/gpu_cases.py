"""The operators that benchmarks.gpu runs, what it gives them, and whether they are right."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import ysnake_kernels as ours
from torch import Tensor

from benchmarks.traffic import Shape

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "kernels"))
OPTIONS = {
    "scan": {"dt_softplus": True},
    "convolution": {"activation": "silu"},
    "norm": {"norm_before_gate": False},
    "step": {"dt_softplus": True},
    "mixer": {"norm_before_gate": False},
}
TINY = Shape(batch=1, length=12, heads=2, head_dim=16, state=16)


def operators(name: str) -> dict[str, Callable]:
    """Every operator of an implementation, all under our names and arguments."""
    if name != "mamba_ssm":
        return {
            "scan": ours.ssd_scan,
            "convolution": ours.causal_conv1d,
            "norm": ours.rms_norm_gated,
            "step": ours.ssd_step,
            "mixer": ours.mamba_split_conv1d_scan_combined,
        }
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.triton import layernorm_gated, selective_state_update, ssd_combined

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
        "convolution": causal_conv1d_fn,
        "norm": partial(layernorm_gated.rmsnorm_fn, bias=None),
        "step": step,
        "mixer": mixer,
    }


def arguments(s: Shape, dtype: torch.dtype, device: str) -> dict[str, dict[str, Tensor]]:
    """Of each operator: activations as slices of one projection, parameters in float32."""
    d_inner, n = s.heads * s.head_dim, s.groups * s.state
    channels = d_inner + 2 * n
    torch.manual_seed(s.length)
    randn = partial(torch.randn, device=device)
    zxbcdt = randn(s.batch, s.length, d_inner + channels + s.heads).to(dtype)
    z, xBC, dt = zxbcdt.split([d_inner, channels, s.heads], -1)
    weight, bias, gain = randn(channels, 4) / 2, randn(channels), randn(d_inner)
    heads = {"A": -torch.rand(s.heads, device=device) - 0.5, "D": randn(s.heads)}
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


def checks(device: str, dry: bool) -> Iterator[dict]:
    """The fused operators against the reference in float64: distance of outputs and gradients."""
    from comparison import TOLERANCES, distance, outputs_and_gradients

    s = replace(TINY, groups=2) if dry else Shape(2, 200, heads=8, groups=2)
    middle = torch.arange(s.length, device=device) >= s.length // 3
    states = torch.randn(s.batch, s.heads, s.head_dim, s.state, device=device)
    bounds = torch.tensor([0, s.length // 3, s.length], dtype=torch.int32, device=device)
    final = {"return_final_states": True}

    def run(op: str, values: dict, options: dict, weights: list | None) -> tuple:
        call = partial(operators("fused")[op], **OPTIONS[op])
        if op != "step":
            return outputs_and_gradients(call, values, options, weights)
        state = values["state"].clone()
        return [call(**values | {"state": state}), state], {}, None

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        forward, backward = TOLERANCES[dtype]
        given = arguments(s, dtype, device)
        documents = {"seq_idx": middle.int().expand(s.batch, -1).contiguous()}
        packed = {k: t[:1] if t.ndim > 2 else t for k, t in given["scan"].items()}
        cases = {op: (op, tensors, {}) for op, tensors in given.items()}
        gate = {"z": torch.randn_like(given["scan"]["x"]), "initial_states": states}
        cases["scan, gate, states"] = ("scan", given["scan"] | gate, final)
        cases["scan, documents"] = ("scan", given["scan"] | documents, final)
        cases["scan, packed"] = ("scan", packed | {"cu_seqlens": bounds}, final)
        for case, (op, tensors, options) in cases.items():
            exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
            row = {"case": case, "dtype": str(dtype)[6:]}
            try:
                with ours.backend("fused"):
                    outputs, gradients, weights = run(op, tensors, options, None)
                with ours.backend("reference"):
                    expected, slopes, _ = run(op, exact, options, weights)
            except Exception as error:  # one that does not run hides none of the others
                failed = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                bad = {"output": math.inf, "gradient": math.inf, "right": False}
                yield row | bad | {"farthest": failed}
                continue
            out = max(map(distance, outputs, expected))
            far = {k: distance(g, slopes[k]) for k, g in gradients.items()} or {"-": 0.0}
            farthest = max(far, key=far.get)
            row |= {"output": out, "farthest": farthest, "gradient": far[farthest]}
            slack = 2 if dry else 1  # the interpreter cuts a bfloat16 off where a GPU rounds it
            right = out <= slack * forward and far[farthest] <= slack * backward
            yield row | {"right": right}
