"""A caller may change outputs in place: the gradients are the same as with a changed copy."""

from importlib.util import find_spec

import pytest
import torch
from comparison import on_device
from ysnake_kernels import (
    backend,
    causal_conv1d,
    mamba_split_conv1d_scan_combined,
    rms_norm_gated,
    selective_scan,
    ssd_scan,
)
from ysnake_kernels.linear import linear, normed_linear

NAMES = [
    "reference",
    "eager",
    pytest.param(
        "fused", marks=pytest.mark.skipif(not find_spec("triton"), reason="Triton is for Linux")
    ),
]


def convolution(t, **options):
    return causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu", **options)


def channel_last_convolution(t):
    return convolution({**t, "x": t["x"].transpose(1, 2).contiguous().transpose(1, 2)})


def convolution_and_states(t):
    return convolution(t, return_final_states=True)


def norm(t):
    return rms_norm_gated(t["x"], t["of_features"], None, t["z"])


def scan(t):
    x, dt = t["x"].unflatten(2, (2, 4)), t["z"][..., :2]
    B, C = t["x"][:, :, None, :3], t["z"][:, :, None, :3]
    A = -t["bias"][:2].exp()
    return ssd_scan(x, dt, A, B, C, D=t["bias"][:2], dt_softplus=True, return_final_states=True)


def scan_of_mamba_1(t):
    B, C = t["x"][:, :4], t["z"][:, :4]
    options = {"delta_softplus": True, "return_last_state": True}
    return selective_scan(t["x"], t["z"], -t["weight"].exp(), B, C, t["bias"], **options)


def mixer(t, **weights):
    zxbcdt = torch.cat([t["x"], t["z"]], 2)  # 4 of z, 4 + 2 * 3 of the convolution, 2 heads
    taps, A = t["taps"], -t["bias"][:2].exp()
    options = {"return_final_states": True, **weights}
    D = t["bias"][2:4]
    return mamba_split_conv1d_scan_combined(zxbcdt, taps, None, None, A, D, **options)


def mixer_with_all(t):
    weights = {"rmsnorm_weight": t["bias"][:4], "norm_before_gate": False}
    return mixer(t, outproj_weight=t["weight"][:, :4], **weights)


def product(t):
    return linear(t["x"], t["projection"], t["shift"])


def product_of_normed(t):
    weights = (t["of_features"], 1e-5, t["projection"], t["shift"])
    return normed_linear(t["x"], None, *weights)[1]


OPERATORS = [
    *(convolution, channel_last_convolution, convolution_and_states, norm, scan),
    scan_of_mamba_1,
    *(mixer, mixer_with_all, product, product_of_normed),
]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (2, 8, 8), "z": (2, 8, 8), "weight": (8, 4), "bias": (8,)}
    shapes |= {"of_features": (8,), "taps": (10, 4), "projection": (5, 8), "shift": (5,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def changed(operator, in_place: bool):
    """The outputs doubled and shifted, and the gradients of the inputs."""
    leaves = {k: t.requires_grad_() for k, t in on_device(tensors()).items()}
    outputs = operator(leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if in_place:
        for out in outputs:
            out += 1
            out.mul_(2)
    else:
        outputs = [(out.clone() + 1) * 2 for out in outputs]
    total = sum(out.sin().sum() for out in outputs)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [t for t in (*outputs, *grads) if t is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.__name__)
def test_outputs_may_be_changed_in_place(operator, name):
    if (operator, name) == (scan_of_mamba_1, "fused"):
        pytest.skip("it has no Triton kernel")
    with backend(name):
        for ours, expected in zip(changed(operator, True), changed(operator, False), strict=True):
            assert torch.equal(ours, expected)
