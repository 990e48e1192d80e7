"""Mamba-1's scan: the eager implementation equals the reference, gradients included."""

import pytest
import torch
from comparison import DTYPES, assert_equals_reference, distance
from ysnake_kernels import backend
from ysnake_kernels.selective_scan import eager, selective_scan

OPTIONAL = ("D", "z", "delta_bias")
OPTIONS = {"delta_softplus": True, "return_last_state": True}


def inputs(length=37, batch=2, channels=12, n=5, groups=2, dtype=torch.float64, without=()):
    torch.manual_seed(length)
    shapes = {"u": (batch, channels, length), "delta": (batch, channels, length)}
    shapes |= {"A": (channels, n), "B": (batch, groups, n, length), "C": (batch, groups, n, length)}
    shapes |= {"D": (channels,), "z": (batch, channels, length), "delta_bias": (channels,)}
    tensors = {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}
    tensors["A"] = -torch.exp(tensors["A"])
    return {k: t.to(dtype) for k, t in tensors.items() if k not in without}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several slices of rows and channels, and blocks of three tokens."""
    monkeypatch.setattr(eager, "TILE_ELEMENTS", 60)
    monkeypatch.setattr(eager, "FEWEST_TOKENS", 3)


@pytest.mark.parametrize("length", [1, 2, 3, 37])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_reference_across_tiles(length, groups, small_tiles):
    tensors = inputs(length, groups=groups)
    tiles = eager._Tiles(tensors["u"].transpose(1, 2), tensors["B"])
    assert len(list(tiles.slices())) > 2
    assert tiles.block <= 4
    assert_equals_reference(selective_scan, tensors, OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_the_reference_in_every_dtype(dtype):
    assert_equals_reference(selective_scan, inputs(100, dtype=dtype), OPTIONS)


@pytest.mark.parametrize("without", [(name,) for name in OPTIONAL] + [OPTIONAL], ids="-".join)
def test_optional_tensors_may_be_missing(without, small_tiles):
    options = {"return_last_state": True, "delta_softplus": "delta_bias" not in without}
    tensors = inputs(without=without)
    if not options["delta_softplus"]:
        tensors["delta"] = tensors["delta"].abs()
    assert_equals_reference(selective_scan, tensors, options)


def test_an_output_alone_has_its_gradients(small_tiles):
    assert_equals_reference(lambda **o: selective_scan(**o)[0], inputs(), OPTIONS)
    C = inputs()["C"]  # the state does not depend on it
    tensors = inputs(without=("C", "D", "z"))
    assert_equals_reference(lambda **o: selective_scan(C=C, **o)[1], tensors, OPTIONS)


@pytest.mark.parametrize("rate", [-1e-6, -1e4, -torch.inf])
def test_slow_and_fast_decays_over_a_long_sequence(rate):
    tensors = inputs(1200, batch=1, channels=4, dtype=torch.float32)
    tensors["A"] = tensors["A"].clone().fill_(rate)
    y, state = selective_scan(**tensors, **OPTIONS)
    with backend("reference"):
        exact = {k: t.double() for k, t in tensors.items()}
        expected, last = selective_scan(**exact, **OPTIONS)
    assert distance(y, expected) <= 2e-5
    assert distance(state, last) <= 2e-5


def test_gradients_at_a_rate_of_minus_infinity():
    """With steps as large as usual. At a step of size zero the slope itself is infinite."""
    tensors = inputs(dtype=torch.float32)
    tensors["A"][::2, 1:3] = -torch.inf
    assert_equals_reference(selective_scan, tensors, OPTIONS)


def test_b_and_c_without_groups_and_transposed_memory():
    tensors = inputs(groups=1)
    expected, state = selective_scan(**tensors, **OPTIONS)
    tensors |= {k: tensors[k][:, 0] for k in "BC"}
    tensors |= {k: tensors[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("u", "delta")}
    y, same = selective_scan(**tensors, **OPTIONS)
    torch.testing.assert_close((y, same), (expected, state))
    torch.testing.assert_close(selective_scan(**tensors, delta_softplus=True), expected)
    assert y.shape == (2, 12, 37)
    assert state.shape == (2, 12, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(12, 5, dtype=torch.complex64)}, "A: expected real numbers"),
        ({"A": torch.ones(12, 5)}, "A: expected values <= 0"),
        ({"A": torch.zeros(11, 5)}, r"A: expected shape \(12, 5\) to match u"),
        ({"B": torch.zeros(12, 5)}, r"B: expected shape \(batch, groups, N, length\)"),
        ({"B": torch.zeros(2, 5, 5, 37)}, "B: expected a number of groups dividing 12, got 5"),
        ({"C": torch.zeros(2, 2, 4, 37)}, "C: expected shape"),
        ({"delta": torch.zeros(2, 12, 36)}, "delta: expected shape"),
        ({"z": torch.zeros(2, 12, 36)}, "z: expected shape"),
        ({"D": torch.zeros(3)}, "D: expected shape"),
        ({"delta_bias": [0.0] * 12}, "delta_bias: expected a tensor"),
        ({"u": torch.zeros(2, 12, 0)}, "u: expected a length of at least 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        selective_scan(**inputs(dtype=torch.float32) | change)


def test_a_forced_triton_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backend("fused"), pytest.raises(RuntimeError, match="no Triton kernel"):
        selective_scan(**inputs())
