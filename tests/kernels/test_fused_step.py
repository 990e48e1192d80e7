"""One token of the recurrence: `fused` and `eager` equal `reference`, in y and in the state."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from comparison import DEVICE, DTYPES, TOLERANCES, distance, on_device
from ysnake_kernels import backend, ssd_step
from ysnake_kernels.step import fused

NAMES = ["eager", "fused"]


def inputs(batch=2, heads=4, head_dim=8, groups=1, n=6, dtype=torch.float64, **extra):
    gen = torch.Generator().manual_seed(heads + n)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    state_dtype = dtype if dtype == torch.float64 else torch.float32
    tensors = {
        "state": randn(extra.get("rows", batch), heads, head_dim, n).to(state_dtype),
        "x": randn(batch, heads, head_dim),
        "dt": (randn(batch, heads).double() - extra.get("offset", 2.0)).to(dtype),
        "A": -randn(heads).exp(),
        "B": randn(batch, groups, n),
        "C": randn(batch, groups, n),
        "D": randn(heads),
        "D_channel": randn(heads, head_dim),
        "z": randn(batch, heads, head_dim),
        "dt_bias": randn(heads),
    }
    for name in ("D", "D_channel", "z", "dt_bias"):
        if not extra.get(name):
            del tensors[name]
    if "D_channel" in tensors:
        tensors["D"] = tensors.pop("D_channel")
    if "indices" in extra:
        tensors["state_batch_indices"] = torch.tensor(extra["indices"], dtype=extra["integer"])
    return on_device(tensors)


def run(name, tensors, dt_softplus=True, **options):
    """y and the state afterwards."""
    state = tensors["state"].clone()
    with backend(name):
        y = ssd_step(**tensors | {"state": state}, dt_softplus=dt_softplus, **options)
    return y, state


def assert_equals_reference(name, tensors, **options):
    tolerance = TOLERANCES[tensors["x"].dtype][0]
    exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    y, state = run(name, tensors, **options)
    expected, expected_state = run("reference", exact, **options)
    assert y.dtype == tensors["x"].dtype
    assert state.dtype == tensors["state"].dtype
    assert distance(y, expected) <= tolerance
    assert distance(state, expected_state) <= tolerance


EVERYTHING = {"D": True, "z": True, "dt_bias": True}

CASES = {
    "plain": ({}, {}),
    "everything": (EVERYTHING, {}),
    "D per channel, two groups": ({"D_channel": True, "groups": 2}, {}),
    "a group per head": ({"groups": 4, "z": True}, {}),
    "no softplus": ({"offset": -3.0}, {"dt_softplus": False}),
    "dt_limit": ({"dt_bias": True, "batch": 3}, {"dt_limit": (0.05, 0.2)}),
    "tiny dt": ({"offset": 12.0}, {}),
    "large dt": ({"offset": -25.0}, {}),
    "one element": ({"batch": 1, "heads": 1, "head_dim": 1, "n": 1}, {}),
    "several tiles a head": ({"head_dim": 21, "n": 130}, {}),
    "rows of the state": ({**EVERYTHING, "rows": 5, "indices": [3, 1], "integer": torch.int32}, {}),
    "int64 rows": ({"rows": 2, "indices": [1, 0], "integer": torch.int64}, {}),
}


@pytest.mark.parametrize(("case", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_reference(case, options, dtype, name):
    assert_equals_reference(name, inputs(**case, dtype=dtype), **options)


@pytest.mark.parametrize("name", ["reference", *NAMES])
def test_rows_not_named_stay(name):
    tensors = inputs(rows=5, indices=[3, 1], integer=torch.int64)
    before = tensors["state"].clone()
    y, state = run(name, tensors)
    for row in (0, 2, 4):
        assert torch.equal(state[row], before[row])
    del tensors["state_batch_indices"]
    tensors["state"] = before[[3, 1]]
    alone, alone_state = run(name, tensors)
    assert torch.equal(y, alone)
    assert torch.equal(state[[3, 1]], alone_state)


@pytest.mark.parametrize("name", NAMES)
def test_state_in_bfloat16(name):
    tensors = inputs(dtype=torch.bfloat16)
    tensors["state"] = tensors["state"].bfloat16()
    assert_equals_reference(name, tensors)


def test_slices_of_one_projection():
    sizes = [32, 6, 6, 4]
    x, B, C, dt = torch.randn(2, sum(sizes), dtype=torch.float64, device=DEVICE).split(
        sizes, dim=-1
    )
    tensors = inputs() | {"x": x.unflatten(-1, (4, 8)), "dt": dt, "B": B[:, None], "C": C[:, None]}
    tensors["A"] = -torch.ones(1, dtype=torch.float64, device=DEVICE).expand(4)
    assert_equals_reference("fused", tensors)
    tensors["x"] = torch.randn(8, 4, 2, dtype=torch.float64, device=DEVICE).permute(2, 1, 0)
    assert_equals_reference("fused", tensors)


def test_nan_is_not_hidden():
    tensors = inputs()
    tensors["dt"][0, 1] = torch.nan
    y, state = run("fused", tensors, dt_limit=(0.0, 1.0))
    assert y[0, 1].isnan().all()
    assert y[1].isfinite().all()
    assert state[0, 1].isnan().all()


def test_library_operator():
    t = inputs(**EVERYTHING, rows=3, indices=[2, 0], integer=torch.int32, dtype=torch.float32)
    tensors = [t[k] for k in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    options = (True, 0.0, float("inf"))
    torch.library.opcheck(fused._operator, (*tensors, t["state_batch_indices"], *options))
    state, tensors = t["state"][:2].clone(), tensors[1:6]
    torch.library.opcheck(fused._operator, (state, *tensors, None, None, None, None, *options))


def test_compiles_whole():
    tensors = inputs(**EVERYTHING, dtype=torch.float32)
    y, state = run("fused", tensors)
    with backend("fused"):
        compiled = torch.compile(ssd_step, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(**tensors, dt_softplus=True), y)
    assert torch.equal(tensors["state"], state)


def test_autocast_and_repeats_change_nothing():
    tensors = inputs(**EVERYTHING, dtype=torch.float32)
    y, state = run("fused", tensors)
    with torch.autocast(tensors["x"].device.type, dtype=torch.bfloat16):
        again, again_state = run("fused", tensors)
    assert torch.equal(y, again)
    assert torch.equal(state, again_state)


BAD = {
    "state: expected shape (2, 4, 8, 6)": {"state": torch.rand(3, 4, 8, 6)},
    "state_batch_indices: expected shape (2,)": {"state_batch_indices": torch.tensor([0])},
    "state_batch_indices: expected one of int32, int64": {"state_batch_indices": torch.rand(2)},
    "state_batch_indices: expected rows from 0 to 1": {"state_batch_indices": torch.tensor([0, 2])},
    "state_batch_indices: expected no row twice": {"state_batch_indices": torch.tensor([1, 1])},
    "dt_limit: expected 0 <= low <= high": {"dt_limit": (1.0, 0.5)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        ssd_step(**{k: t.cpu() for k, t in inputs(dtype=torch.float32).items()} | BAD[message])
    assert message in str(error.value)


def test_too_large_a_state_is_an_error():
    with backend("fused"), pytest.raises(ValueError, match="B: expected a state size of at most"):
        ssd_step(**inputs(heads=1, head_dim=1, n=fused.MAX_STATE + 1))
