"""Inside `torch.autocast` gradients, and steps of float32 or float64, are those outside."""

import pytest
import torch
from ysnake_kernels import (
    causal_conv1d,
    mamba_split_conv1d_scan_combined,
    rms_norm_gated,
    selective_scan,
    ssd_scan,
)
from ysnake_kernels.dropin.functions import selective_state_update

# name -> shapes of the arguments, and the operator
OPERATORS = {
    "scan": (
        [(2, 150, 2, 8), (2, 150, 2), (2,), (2, 150, 1, 8), (2, 150, 1, 8)],
        lambda x, dt, A, B, C: ssd_scan(x, dt, -A.exp(), B, C, dt_softplus=True),
    ),
    "selective scan": (
        [(2, 8, 50), (2, 8, 50), (8, 4), (2, 4, 50), (2, 4, 50)],
        lambda u, dt, A, B, C: selective_scan(u, dt, -A.exp(), B, C, delta_softplus=True),
    ),
    "mixer": (
        [(2, 150, 24), (14, 4), (2,), (8,), (3, 8)],
        lambda zxbcdt, taps, A, norm, out: mamba_split_conv1d_scan_combined(
            zxbcdt, taps, None, None, -A.exp(), None, rmsnorm_weight=norm, outproj_weight=out
        ),
    ),
    "convolution": ([(2, 8, 50), (8, 4)], causal_conv1d),
    "norm": ([(2, 8), (8,)], rms_norm_gated),
}


@pytest.mark.parametrize(("shapes", "operator"), OPERATORS.values(), ids=OPERATORS)
def test_backward_inside_is_as_outside(shapes, operator):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def gradients(inside):
        with torch.autocast("cpu", torch.bfloat16):
            loss = operator(*leaves).float().square().sum()
            if inside:
                return torch.autograd.grad(loss, leaves)
        return torch.autograd.grad(loss, leaves)

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


def test_a_step_inside_is_as_outside():
    """Mamba-1's step, in torch's own operations."""
    torch.manual_seed(0)
    state, x, dt, A = torch.randn(2, 8, 16), torch.randn(2, 8), torch.rand(2, 8), -torch.rand(8, 16)
    B, C = torch.randn(2, 2, 16)
    outside, inside = state.clone(), state.clone()
    expected = selective_state_update(outside, x, dt, A, B, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_state_update(inside, x, dt, A, B, C)
    assert torch.equal(y, expected)
    assert torch.equal(inside, outside)


def test_the_mixer_of_float64_stays_in_float64():
    """As torch's linear layer does."""
    shapes, operator = OPERATORS["mixer"]
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = operator(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(*tensors), expected)
