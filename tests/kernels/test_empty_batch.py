"""A batch without rows gives outputs and gradients without rows, as in the reference."""

from functools import partial

import pytest
import torch
from ysnake_kernels import (
    backend,
    causal_conv1d,
    mamba_split_conv1d_scan_combined,
    selective_scan,
    ssd_scan,
    ssd_step,
)


def mixer(zxbcdt, taps, A, norm, out, conv_state, state, **options):
    return mamba_split_conv1d_scan_combined(
        *(zxbcdt, taps, None, None, A, None),
        initial_states=state,
        conv_initial_states=conv_state,
        rmsnorm_weight=norm,
        outproj_weight=out,
        **options,
    )


OPERATORS = {
    "convolution": ([(0, 4, 5), (4, 3)], causal_conv1d),
    "scan": ([(0, 5, 2, 4), (0, 5, 2), (2,), (0, 5, 1, 3), (0, 5, 1, 3)], ssd_scan),
    "selective scan": ([(0, 4, 5), (0, 4, 5), (4, 3), (0, 3, 5), (0, 3, 5)], selective_scan),
    "mixer": ([(0, 5, 24), (14, 4), (2,), (8,), (6, 8), (0, 14, 3), (0, 2, 4, 3)], mixer),
    "mixer, gate before the norm": (
        [(0, 5, 24), (14, 4), (2,), (8,), (6, 8), (0, 14, 3), (0, 2, 4, 3)],
        partial(mixer, norm_before_gate=False),
    ),
}


@pytest.mark.parametrize(("shapes", "operator"), OPERATORS.values(), ids=OPERATORS)
def test_no_rows(shapes, operator):
    leaves = [torch.full(shape, -1.0, requires_grad=True) for shape in shapes]
    found = {}
    for name in ("reference", "eager"):
        with backend(name):
            y = operator(*leaves)
            found[name] = [t.shape for t in (y, *torch.autograd.grad(y.sum(), leaves))]
    assert found["eager"] == found["reference"]


def test_no_rows_and_an_initial_state():
    x, dt, A = torch.ones(0, 5, 2, 4), torch.ones(0, 5, 2), -torch.ones(2)
    B = torch.ones(0, 5, 1, 3)
    state = torch.ones(0, 2, 4, 3, requires_grad=True)
    y, last = ssd_scan(x, dt, A, B, B, initial_states=state, return_final_states=True)
    (gradient,) = torch.autograd.grad(y.sum() + last.sum(), state)
    assert (y.shape, last.shape, gradient.shape) == (x.shape, state.shape, state.shape)


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_a_step_whose_rows_are_all_padding(name):
    state = torch.ones(4, 2, 8, 16)
    x, dt, A, B = torch.ones(3, 2, 8), torch.ones(3, 2), -torch.ones(2), torch.ones(3, 1, 16)
    with backend(name):
        y = ssd_step(state, x, dt, A, B, B, state_batch_indices=torch.full((3,), -1))
    assert y.shape == x.shape
    assert not y.any()
    assert (state == 1).all()
