"""Operators inside torch's checkpoint, which recomputes in backward. TRL uses it by default.

It allows a gradient to read what was saved only once, and forward to save the same a second time.
"""

import pytest
import torch
from comparison import on_device
from test_in_place import NAMES, OPERATORS, scan_of_mamba_1, tensors
from torch.utils.checkpoint import checkpoint
from ysnake_kernels import backend


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.__name__)
def test_gradients_are_those_without_a_checkpoint(operator, name):
    if (operator, name) == (scan_of_mamba_1, "fused"):
        pytest.skip("it has no Triton kernel")

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
