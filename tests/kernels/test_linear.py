"""Linear layers equal torch's, in outputs and gradients, whichever library multiplies."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from comparison import distance
from ysnake_kernels import backend, rms_norm_gated
from ysnake_kernels import linear as module
from ysnake_kernels.linear import Linear, _rounded, linear, normed_linear

ONEDNN = pytest.param(
    True,
    marks=pytest.mark.skipif(
        not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
    ),
)


@pytest.fixture(params=[ONEDNN, False], ids=["oneDNN", "BLAS"])
def library(request, monkeypatch):
    """As on a CPU where oneDNN is the faster one, or is not."""
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: request.param)
    return request.param


def operands(*shape, outputs=24, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=gen, dtype=dtype)
    weight = torch.randn(outputs, shape[-1], generator=gen, dtype=dtype)
    bias = torch.randn(outputs, generator=gen, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, bias)]


def check(function, expected_function, tensors, tolerance=1e-6):
    """The same output and gradients as in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y, expected = function(*tensors), expected_function(*exact)
    assert y.shape == expected.shape
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y))
    exact_grads = torch.autograd.grad(
        expected, [t for t in exact if t is not None], dy.to(expected)
    )
    for ours, theirs in zip((y, *grads), (expected, *exact_grads), strict=True):
        assert ours.dtype == tensors[0].dtype
        assert distance(ours, theirs) < tolerance


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 17, 33, 100, 129])
def test_any_number_of_rows(library, rows):
    check(linear, F.linear, operands(rows, 40))


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (2, 0, 40), (0, 40)])
def test_any_shape(library, shape):
    check(linear, F.linear, operands(*shape))


def test_without_bias(library):
    x, weight, _ = operands(5, 40)
    check(linear, F.linear, [x, weight, None])


def test_strided_operands(library):
    x, weight, bias = operands(7, 2, 40)
    x, weight = x.detach()[:, 1], weight.detach().t().contiguous().t()
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    check(linear, F.linear, [t.requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(library, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    check(linear, F.linear, operands(5, 40, dtype=dtype), tolerance)


def test_only_what_needs_a_gradient_gets_one(library):
    x, weight, bias = operands(5, 40)
    weight.requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert weight.grad is None
    assert distance(x.grad, weight.sum(0).expand(5, -1)) < 1e-6
    assert distance(bias.grad, torch.full((24,), 5.0)) < 1e-6


FUSED = pytest.param(
    "fused", marks=pytest.mark.skipif(not find_spec("triton"), reason="Triton is for Linux")
)


@pytest.mark.parametrize("name", ["eager", FUSED])
@pytest.mark.parametrize("with_sum", [False, True], ids=["alone", "added"])
def test_normed(library, name, with_sum):
    x, weight, bias = operands(3, 5, 40)
    added = torch.randn(3, 5, 40).requires_grad_() if with_sum else None
    norm_weight = torch.linspace(0.5, 2, 40).requires_grad_()

    def ours(x, added, norm_weight, weight, bias):
        return torch.cat(normed_linear(x, added, norm_weight, 1e-5, weight, bias), -1)

    def expected(x, added, norm_weight, weight, bias):
        total = x if added is None else x + added
        normalised = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return torch.cat([total, F.linear(normalised * norm_weight, weight, bias)], -1)

    with backend(name):
        check(ours, expected, [x, added, norm_weight, weight, bias])


@pytest.mark.parametrize("name", ["eager", FUSED])
@pytest.mark.parametrize("used", [0, 1], ids=["the sum", "the product"])
def test_normed_where_one_output_is_used(name, used):
    x, weight, bias = operands(3, 40)
    leaves = [x, torch.randn(3, 40).requires_grad_(), torch.ones(40, requires_grad=True)]

    def gradients(name):
        with backend(name):
            output = normed_linear(*leaves, 1e-5, weight, bias)[used]
        return torch.autograd.grad(output.sum(), leaves[:2])

    for ours, theirs in zip(gradients(name), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_normed_keeps_its_input_alone(library):
    x, weight, bias = operands(64, 40)
    norm_weight = torch.ones(40, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normed_linear(x, None, norm_weight, 1e-5, weight, bias)
    ours = {t.untyped_storage().data_ptr() for t in (x, weight, bias, norm_weight)}
    assert {t.untyped_storage().data_ptr() for t in kept} <= ours


def test_under_autocast_in_its_dtype(library):
    x, weight, bias = operands(5, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, bias)
        _, normed = normed_linear(x, None, torch.ones(40), 1e-5, weight, bias)
    assert y.dtype == normed.dtype == torch.bfloat16
    assert distance(y, F.linear(x, weight, bias)) < 1e-2
    normalised = rms_norm_gated(x, torch.ones(40), eps=1e-5)
    assert distance(normed, F.linear(normalised, weight, bias)) < 1e-2


def test_the_module_has_the_names_of_torchs():
    ours, theirs = Linear(4, 3), torch.nn.Linear(4, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4)
    assert distance(ours(x), theirs(x)) < 1e-6


def test_onednn_sees_few_numbers_of_rows():
    """For each it writes code, which stays in memory."""
    rounded = [_rounded(rows) for rows in range(1, 1025)]
    assert len(set(rounded)) <= 36
    assert all(rows <= size < 1.25 * rows + 1 for rows, size in enumerate(rounded, 1))


def test_a_shape_that_does_not_fit_is_an_error(library):
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 5), torch.randn(3, 4))
