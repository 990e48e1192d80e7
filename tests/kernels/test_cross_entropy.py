"""The cross-entropy that leaves its gradient: every implementation equals torch's own."""

import pytest
import torch
from comparison import DEVICE
from ysnake_kernels import backend, cross_entropy_

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}
NAMES = ["eager", "fused"]


@pytest.fixture(params=NAMES)
def name(request):
    if request.param == "fused":
        pytest.importorskip("triton", reason="Triton is for Linux")
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("vocab", [2, 50, 4096, 9001])
def test_equals_reference(name, dtype, vocab):
    torch.manual_seed(0)
    logits = (20 * torch.randn(9, vocab, device=DEVICE)).to(dtype)
    targets = torch.randint(vocab, (9,), device=DEVICE)
    targets[2], targets[5] = -100, vocab - 1
    exact = logits.to(torch.float64, copy=True)
    with backend("reference"):
        expected = cross_entropy_(exact, targets)
    with backend(name):
        loss = cross_entropy_(logits, targets)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=TOLERANCES[dtype])
    assert not logits[2].any()


def test_reference_is_cross_entropy():
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    with backend("reference"):
        loss = cross_entropy_(logits, torch.tensor([1, -100]))
    assert loss.item() == pytest.approx(0.6931471805599453)
    assert logits.tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_no_tokens(name):
    with backend(name):
        loss = cross_entropy_(
            torch.empty(0, 5, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
        )
    assert loss.item() == 0


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_logit_of_minus_infinity_has_no_probability(name, dtype):
    torch.manual_seed(0)
    logits = torch.randn(4, 5000, device=DEVICE).to(dtype)
    logits[0, :4096] = -torch.inf  # all that the fused kernel reads first
    logits[1, :-1] = -torch.inf
    logits[2, 0] = -torch.inf
    logits[3] = torch.finfo(dtype).min
    targets = torch.tensor([4500, 4999, -100, 7], device=DEVICE)
    exact = logits.to(torch.float64, copy=True)
    with backend("reference"):
        expected = cross_entropy_(exact, targets)
    with backend(name):
        loss = cross_entropy_(logits, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("which", ["reference", *NAMES])
def test_autograd_knows_of_the_change_and_asks_for_nothing(which):
    if which == "fused":
        pytest.importorskip("triton", reason="Triton is for Linux")
    logits, leaf = torch.randn(2, 5, device=DEVICE), torch.ones((), device=DEVICE).requires_grad_()
    used = leaf * logits
    with backend(which):
        cross_entropy_(logits, torch.tensor([1, 2], device=DEVICE))
    assert not logits.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.sum().backward()


def test_nan_shows(name):
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 1] = torch.nan
    with backend(name):
        assert not cross_entropy_(logits, torch.tensor([0, 1], device=DEVICE)).isfinite()


LOGITS, TARGETS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "error", "names"),
    [
        (LOGITS.int(), TARGETS, TypeError, "logits"),
        (LOGITS[0], TARGETS, ValueError, "logits"),
        (LOGITS.t(), TARGETS, ValueError, "contiguous"),
        (LOGITS, TARGETS.int(), TypeError, "targets"),
        (LOGITS, TARGETS[:1], ValueError, "targets"),
        (LOGITS, [0, 0], TypeError, "targets"),
    ],
)
def test_bad_arguments(logits, targets, error, names):
    with pytest.raises(error, match=names):
        cross_entropy_(logits, targets)


def test_a_target_out_of_range_is_an_error():
    with backend("eager"), pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy_(torch.zeros(2, 5), torch.tensor([1, -1]))
