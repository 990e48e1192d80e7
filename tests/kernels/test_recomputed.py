"""Operators inside torch's checkpoint, which recomputes in backward. TRL uses it by default.

Backward may then read a saved tensor only once. The second forward must save the same tensors.
"""

import pytest
import torch
from comparison import on_device
from test_in_place import NAMES, OPERATORS, convolution, mixer, norm, scan, tensors
from torch.utils.checkpoint import checkpoint
from ysnake_kernels import backend


def assert_same(operator, name):
    def gradients(recompute: bool) -> list[torch.Tensor]:
        leaves = {k: t.requires_grad_() for k, t in on_device(tensors()).items()}
        if recompute:
            outputs = checkpoint(operator, leaves, use_reentrant=False)
        else:
            outputs = operator(leaves)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        total = sum(out.sin().sum() for out in outputs)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return [g for g in grads if g is not None]

    with backend(name):
        assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.__name__)
def test_gradients_are_those_without_a_checkpoint(operator):
    assert_same(operator, "eager")


@pytest.mark.parametrize("name", NAMES[2:])
@pytest.mark.parametrize("operator", [convolution, norm, scan, mixer], ids=lambda o: o.__name__)
def test_gradients_of_the_kernels_are_too(operator, name):
    assert_same(operator, name)
