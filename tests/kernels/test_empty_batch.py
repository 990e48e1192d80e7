"""A batch without rows gives outputs and gradients without rows, as in the reference."""

import pytest
import torch
from ysnake_kernels import backend, causal_conv1d, selective_scan, ssd_scan

OPERATORS = {
    "convolution": ([(0, 4, 5), (4, 3)], causal_conv1d),
    "scan": ([(0, 5, 2, 4), (0, 5, 2), (2,), (0, 5, 1, 3), (0, 5, 1, 3)], ssd_scan),
    "selective scan": ([(0, 4, 5), (0, 4, 5), (4, 3), (0, 3, 5), (0, 3, 5)], selective_scan),
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
