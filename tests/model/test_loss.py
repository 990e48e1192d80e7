"""The loss in slices equals cross-entropy of all logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from small import model

from ysnake.model import loss
from ysnake.model.config import IGNORED


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_slices_equal_the_whole(monkeypatch, rows, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=dtype, requires_grad=True)
    scale = 20 if dtype == torch.float64 else 1  # confident, and often wrong
    weight = (scale * torch.randn(50, 8, dtype=dtype)).requires_grad_()
    targets = torch.randint(50, (37,))
    targets[::5] = IGNORED
    monkeypatch.setattr(loss, "SLICE", 50 * rows)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    ours = loss.summed_loss(hidden, weight, targets)
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    torch.testing.assert_close(ours, expected)
    leaves = (hidden, weight)
    gradients = torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * expected, leaves)
    for got, ref in zip(*gradients, strict=True):
        torch.testing.assert_close(got, ref)
    with torch.no_grad():
        assert torch.equal(loss.summed_loss(hidden, weight, targets), ours)


def test_autocast_keeps_the_softmax_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss.summed_loss(hidden, weight, targets)
    assert ours.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    torch.testing.assert_close(ours, F.cross_entropy(rounded, targets, reduction="sum"))
    ours.backward()
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("sizes", [{}, {"tied": False, "output_size": 16}], ids=["tied", "factors"])
def test_loss_of_the_model_is_that_of_its_logits(sizes):
    m = model(**sizes)
    ids, targets = torch.randint(300, (2, 2, 11))
    seq_idx = torch.tensor([[0] * 5 + [1] * 6]).expand(2, -1)
    expected = F.cross_entropy(m(ids, seq_idx).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(m.loss(ids, targets, seq_idx), expected)
