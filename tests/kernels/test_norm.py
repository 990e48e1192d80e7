"""Gated RMSNorm: `eager` equals `reference` in output and every gradient."""

import pytest
import torch
from comparison import DTYPES, TOLERANCES, assert_equals_reference, distance
from ysnake_kernels import backend, rms_norm_gated
from ysnake_kernels.norm import eager


def inputs(shape=(3, 5, 12), dtype=torch.float64, **extra):
    gen = torch.Generator().manual_seed(len(shape))
    shapes = {"x": shape, "weight": shape[-1:], "bias": shape[-1:], "z": shape}
    return {
        name: torch.randn(size, generator=gen, dtype=torch.float64).to(dtype)
        for name, size in shapes.items()
        if extra.get(name, True)
    }


CASES = {
    "no gate": ({"z": False}, {}),
    "no bias": ({"bias": False}, {}),
    "gate after the norm": ({}, {}),
    "gate before the norm": ({}, {"norm_before_gate": False}),
    "groups, gate before": ({}, {"norm_before_gate": False, "group_size": 4}),
    "groups, gate after": ({}, {"group_size": 3}),
    "one row": ({"shape": (12,)}, {"norm_before_gate": False}),
    "large eps": ({}, {"eps": 0.5}),
}


@pytest.mark.parametrize(("case", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference(case, options, dtype):
    assert_equals_reference(rms_norm_gated, inputs(**case, dtype=dtype), options)


def test_many_blocks_equal_one(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 12 * 2)
    assert_equals_reference(rms_norm_gated, inputs(), {"norm_before_gate": False})


def test_strided_gate():
    """x and z as slices of one projection."""
    x, z = torch.randn(2, 7, 24, dtype=torch.float64).split(12, dim=-1)
    tensors = {"x": x, "weight": torch.randn(12, dtype=torch.float64), "z": z}
    assert_equals_reference(rms_norm_gated, tensors, {"norm_before_gate": False})


BAD = {
    "weight: expected shape (12,)": {"weight": torch.rand(11)},
    "z: expected shape (3, 5, 12)": {"z": torch.rand(3, 12)},
    "bias: expected shape (12,)": {"bias": torch.rand(3)},
    "group_size: expected a divisor of 12 features, got 5": {"group_size": 5},
    "x: expected a floating-point tensor, got torch.int64": {"x": torch.ones(3, 12).long()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        rms_norm_gated(**inputs(dtype=torch.float32) | BAD[message])
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_result_in_another_dtype(name):
    x, weight = torch.randn(5, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    with backend(name):
        y, expected = (rms_norm_gated(x, weight, out_dtype=d) for d in (torch.bfloat16, None))
    assert torch.equal(y, expected.bfloat16())
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
        strict=True,
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("scale", [1, 1e6])  # times a number of float16 it would overflow
def test_result_in_a_wider_dtype_is_not_rounded_before(name, scale):
    tensors = inputs(dtype=torch.float16)
    tensors["weight"] = scale * tensors["weight"].float()
    exact = {k: t.double() for k, t in tensors.items()}
    with backend(name):
        y = rms_norm_gated(**tensors, out_dtype=torch.float32)
    assert distance(y, rms_norm_gated(**exact)) <= TOLERANCES[torch.float32][0]
