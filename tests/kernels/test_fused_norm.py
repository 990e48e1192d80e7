"""The fused gated RMSNorm equals `reference`, compiles, and repeats to the bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from comparison import DEVICE, DTYPES, assert_equals_reference, on_device
from test_norm import CASES
from test_norm import inputs as on_cpu
from ysnake_kernels import backend, rms_norm_gated
from ysnake_kernels.norm import fused


def inputs(**options):
    return on_device(on_cpu(**options))


@pytest.mark.parametrize(("case", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference(case, options, dtype):
    assert_equals_reference(rms_norm_gated, inputs(**case, dtype=dtype), options, name="fused")


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_several_tiles_a_program(rows, monkeypatch):
    """Rows that no tile divides, and more tiles than programs."""
    monkeypatch.setattr(fused, "TILE", 16 * 2)
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    tensors = inputs(shape=(rows, 12), dtype=torch.float32)
    options = {"norm_before_gate": False, "group_size": 6}
    assert_equals_reference(rms_norm_gated, tensors, options, name="fused")


def test_strided_inputs():
    """x and z as slices of one projection, and x with its features apart."""
    x, z = torch.randn(2, 7, 24, dtype=torch.float64, device=DEVICE).split(12, dim=-1)
    tensors = {"x": x, "weight": inputs()["weight"], "z": z}
    assert_equals_reference(rms_norm_gated, tensors, {"norm_before_gate": False}, name="fused")
    tensors["x"] = torch.randn(2, 12, 7, dtype=torch.float64, device=DEVICE).transpose(1, 2)
    assert_equals_reference(rms_norm_gated, tensors, {}, name="fused")


def test_a_gradient_of_zero_stride():
    tensors = {k: t.requires_grad_() for k, t in inputs().items()}
    with backend("fused"):
        fast = torch.autograd.grad(rms_norm_gated(**tensors).sum(), [*tensors.values()])
    with backend("eager"):
        exact = torch.autograd.grad(rms_norm_gated(**tensors).sum(), [*tensors.values()])
    torch.testing.assert_close(fast, exact)


def test_no_rows():
    tensors = {k: t.requires_grad_() for k, t in inputs(shape=(0, 12)).items()}
    with backend("fused"):
        y = rms_norm_gated(**tensors)
    assert y.shape == (0, 12)
    for gradient in torch.autograd.grad(y.sum(), [*tensors.values()]):
        assert not gradient.any()


def test_library_operators():
    tensors = [t.requires_grad_() for t in inputs(shape=(2, 12), dtype=torch.float32).values()]
    x, weight, bias, z = tensors
    for norm_first in (True, False):
        torch.library.opcheck(fused._norm, (x, weight, bias, z, 1e-6, 6, norm_first, x.dtype))
        torch.library.opcheck(fused._norm, (x, weight, None, None, 1e-6, 12, norm_first, x.dtype))


def test_compiles_whole():
    tensors = {k: t.requires_grad_() for k, t in inputs(dtype=torch.float32).items()}

    def loss(tensors):
        return rms_norm_gated(**tensors, norm_before_gate=False).square().sum()

    with backend("fused"):
        expected = torch.autograd.grad(loss(tensors), [*tensors.values()])
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(tensors)
        got = torch.autograd.grad(compiled, [*tensors.values()])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing():
    tensors = inputs(dtype=torch.float32)
    with backend("fused"):
        expected = rms_norm_gated(**tensors)
        with torch.autocast(tensors["x"].device.type, dtype=torch.bfloat16):
            assert torch.equal(rms_norm_gated(**tensors), expected)


def test_repeats_to_the_bit():
    runs = []
    for _ in range(2):
        tensors = {k: t.requires_grad_() for k, t in inputs(dtype=torch.bfloat16).items()}
        with backend("fused"):
            y = rms_norm_gated(**tensors, norm_before_gate=False, group_size=4)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), [*tensors.values()])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_too_large_a_group_is_an_error():
    features = fused.MAX_GROUP + 1
    with backend("fused"), pytest.raises(ValueError, match="group_size: expected at most"):
        rms_norm_gated(torch.rand(1, features, device=DEVICE), torch.rand(features, device=DEVICE))
