"""The fused causal convolution equals `reference`, compiles, and repeats to the bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from comparison import (
    DEVICE,
    DTYPES,
    TOLERANCES,
    assert_equals_reference,
    distance,
    on_device,
)
from test_conv import CASES
from test_conv import inputs as on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from ysnake_kernels import backend, causal_conv1d, causal_conv1d_step
from ysnake_kernels.conv import fused

OPTIONS = {"activation": "silu", "return_final_states": True}
FORWARD, BACKWARD = fused.FORWARD, fused.BACKWARD
SUPPORTED = {k: case for k, case in CASES.items() if case.get("width", 4) <= fused.MAX_WIDTH}


def inputs(*sizes, **options):
    return on_device(on_cpu(*sizes, **options))


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, for an interpreter that takes its time over each token."""
    monkeypatch.setattr(fused, "FORWARD", {"LANES": 16, "RUN": 2, "CHANNELS": 8, "num_warps": 1})
    monkeypatch.setattr(fused, "BACKWARD", {"LANES": 16, "RUN": 2, "CHANNELS": 8, "num_warps": 1})


def test_blocks_as_on_a_device(monkeypatch):
    monkeypatch.setattr(fused, "FORWARD", FORWARD)
    monkeypatch.setattr(fused, "BACKWARD", BACKWARD)
    assert_equals_reference(causal_conv1d, inputs(length=150, seq_idx=True), OPTIONS, name="fused")


@pytest.mark.parametrize("case", SUPPORTED.values(), ids=SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference(case, dtype):
    assert_equals_reference(causal_conv1d, inputs(**case, dtype=dtype), OPTIONS, name="fused")


@pytest.mark.parametrize("seq_idx", [False, True], ids=["one document", "documents"])
def test_no_activation(seq_idx):
    options = {"return_final_states": True}
    assert_equals_reference(causal_conv1d, inputs(seq_idx=seq_idx), options, name="fused")


@pytest.mark.parametrize(
    ("width", "states", "seq_idx"),
    [  # every pair of two of them
        *((4, True, True), (4, False, False), (3, True, False), (3, False, True)),
        *((2, True, True), (2, False, False)),
    ],
)
def test_several_blocks(monkeypatch, width, states, seq_idx):
    """Blocks and runs that the length does not divide, and more channels than a program has."""
    monkeypatch.setattr(fused, "FORWARD", {"LANES": 4, "RUN": 2, "CHANNELS": 4, "num_warps": 1})
    monkeypatch.setattr(fused, "BACKWARD", {"LANES": 4, "RUN": 3, "CHANNELS": 4, "num_warps": 1})
    tensors = inputs(1, 6, 17, width, initial_states=states, seq_idx=seq_idx)
    assert_equals_reference(causal_conv1d, tensors, OPTIONS, name="fused")


def test_gradient_of_output_or_state_alone():
    tensors = inputs(seq_idx=True)
    silent = {"return_final_states": False}
    assert_equals_reference(causal_conv1d, tensors, OPTIONS | silent, name="fused")
    no_effect_on_the_state = {name: tensors.pop(name) for name in ("weight", "bias")}

    def states(**kw):
        return causal_conv1d(**kw, **no_effect_on_the_state)[1]

    short = tensors | {
        "x": tensors["x"][..., :2],
        "seq_idx": torch.zeros(2, 2, dtype=torch.int32, device=DEVICE),
    }
    assert_equals_reference(states, short, OPTIONS, name="fused")
    del tensors["initial_states"]
    assert_equals_reference(states, tensors, OPTIONS, name="fused")


def test_a_slice_of_a_projection_and_gradients_of_any_stride():
    projection = randn(2, 23, 20, dtype=torch.float64)
    tensors = inputs() | {"x": projection[:, :, 5:11].transpose(1, 2)}
    tensors["initial_states"] = tensors["initial_states"].transpose(1, 2).contiguous()
    tensors["initial_states"] = tensors["initial_states"].transpose(1, 2)
    assert_equals_reference(causal_conv1d, tensors, OPTIONS, name="fused")

    def flipped(**kw):
        y, states = causal_conv1d(**kw)
        return y.transpose(0, 2).contiguous(), states.sum()

    assert_equals_reference(flipped, tensors, OPTIONS, name="fused")


def test_output_is_laid_out_as_the_input():
    with backend("fused"):
        for channel_last in (True, False):
            tensors = inputs(channel_last=channel_last)
            assert causal_conv1d(**tensors).stride() == tensors["x"].stride()


@pytest.mark.parametrize("name", ["eager", "fused"])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_step_equals_reference(name, width, dtype):
    tensors = inputs(length=1, width=width, dtype=dtype)
    exact = {k: t.double() for k, t in tensors.items()}
    runs = {}
    for run, t in ((name, tensors), ("reference", exact)):
        state = t["initial_states"].clone()
        with backend(run):
            y = causal_conv1d_step(t["x"][:, :, 0], state, t["weight"], t["bias"], "silu")
        runs[run] = y, state
    assert runs[name][0].dtype == dtype
    assert distance(runs[name][0], runs["reference"][0]) <= TOLERANCES[dtype][0]
    assert torch.equal(runs[name][1].double(), runs["reference"][1])


@pytest.mark.parametrize("name", ["reference", "eager", "fused"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_step_on_rows_of_a_state(name, integer):
    x, weight = randn(2, 6), randn(6, 4)
    rows = randn(5, 3, 6).transpose(1, 2)  # any strides
    alone, all_rows = rows[[3, 1]].clone(), rows.clone()
    indices = torch.tensor([3, 1], dtype=integer, device=DEVICE)
    with backend(name):
        expected = causal_conv1d_step(x, alone, weight)
        y = causal_conv1d_step(x, all_rows, weight, conv_state_indices=indices)
    assert torch.equal(y, expected)
    assert torch.equal(all_rows[[3, 1]], alone)
    assert torch.equal(all_rows[[0, 2, 4]], rows[[0, 2, 4]])


@pytest.mark.parametrize("name", ["reference", "eager", "fused"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("size", [4, 7])
def test_a_step_of_a_state_with_older_tokens(name, size, contiguous):
    x, weight, bias = randn(2, 6), randn(6, 4), randn(6)
    state = randn(2, 6, size) if contiguous else randn(2, size, 6).transpose(1, 2)
    moved, short = state.clone(), state[:, :, -3:].clone()
    rows, indices = torch.cat([state, randn(3, 6, size)]), torch.tensor([1, -1, 0], device=DEVICE)
    before = rows.clone()
    with backend(name):
        y = causal_conv1d_step(x, moved, weight, bias, "silu")
        expected = causal_conv1d_step(x, short, weight, bias, "silu")
        padded = causal_conv1d_step(x[[1, 0, 0]], rows, weight, bias, "silu", indices)
    torch.testing.assert_close(y, expected)
    assert torch.equal(moved, torch.cat([state[:, :, 1:], x[:, :, None]], 2))
    torch.testing.assert_close(padded[[2, 0]], expected)
    assert not padded[1].any()
    assert torch.equal(rows, torch.cat([moved, before[2:]]))


@pytest.mark.parametrize("name", ["reference", "eager", "fused"])
def test_a_step_keeps_an_exact_state(name):
    """A float32 state under bfloat16 tokens is not rounded."""
    state = randn(2, 6, 3)
    later = state[:, :, 1:].clone()
    with backend(name):
        causal_conv1d_step(randn(2, 6, dtype=torch.bfloat16), state, randn(6, 4))
    assert torch.equal(state[:, :, :2], later)


def test_a_step_looks_at_no_rows():
    """So a CUDA graph can hold it, also where the state has tokens that no tap reads."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    rows = torch.tensor([3, -1], device=DEVICE)
    with Seen():
        fused.conv_step(randn(2, 6), randn(5, 6, 5), randn(6, 4), None, True, rows)
    assert seen
    assert not [name for name in seen if name.startswith(("aten.index", "aten.nonzero"))]


def test_library_operators():
    t = inputs(length=10, channels=3, dtype=torch.float32)
    floats = {k: v.requires_grad_() for k, v in t.items()}
    seq_idx = torch.tensor([0] * 4 + [1] * 6, device=DEVICE).repeat(2, 1)
    x, weight, bias, states = (floats[k] for k in ("x", "weight", "bias", "initial_states"))
    torch.library.opcheck(fused._conv, (x, weight, bias, seq_idx, states, True))
    torch.library.opcheck(fused._conv, (x, weight, None, None, None, False))
    x, state = x.detach()[:, :, 0], states.detach().clone()
    weight, bias = weight.detach(), bias.detach()
    torch.library.opcheck(
        fused._conv_step, (x, state, weight, bias, torch.tensor([1, 0], device=DEVICE), True)
    )
    torch.library.opcheck(fused._conv_step, (x, state, weight, None, None, False))


def test_compiles_whole():
    tensors = {k: t.requires_grad_() for k, t in inputs(dtype=torch.float32).items()}

    def loss(tensors):
        y, states = causal_conv1d(**tensors, **OPTIONS)
        return y.square().sum() + states.sum()

    with backend("fused"):
        expected = torch.autograd.grad(loss(tensors), [*tensors.values()])
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(tensors)
        got = torch.autograd.grad(compiled, [*tensors.values()])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("rows", [None, [4, -1, 1]], ids=str)
def test_step_compiles_whole(size, rows):
    torch.compiler.reset()
    x, state, weight = randn(3, 6), randn(3 if rows is None else 5, 6, size), randn(6, 4)
    options = {"conv_state_indices": None if rows is None else torch.tensor(rows, device=DEVICE)}
    with backend("fused"):
        expected_state = state.clone()
        expected = causal_conv1d_step(x, expected_state, weight, **options)
        compiled = torch.compile(causal_conv1d_step, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, state, weight, **options), expected)
    assert torch.equal(state, expected_state)


def test_autocast_and_repeats_change_nothing():
    runs = []
    for enabled in (False, True):
        tensors = {k: t.requires_grad_() for k, t in inputs(dtype=torch.float32).items()}
        autocast = torch.autocast(tensors["x"].device.type, dtype=torch.bfloat16, enabled=enabled)
        with backend("fused"), autocast:
            y, states = causal_conv1d(**tensors, **OPTIONS)
        loss = y.square().sum() + states.square().sum()
        runs.append([y, states, *torch.autograd.grad(loss, [*tensors.values()])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_unsupported_width_is_an_error():
    with backend("fused"):
        with pytest.raises(ValueError, match="weight: expected a width of at most 4"):
            causal_conv1d(**inputs(width=5))
        with pytest.raises(ValueError, match="weight: expected a width of at most 4"):
            causal_conv1d_step(randn(2, 6), randn(2, 6, 4), randn(6, 5))


BAD = {
    "conv_state: expected shape (2, 6, 3)": {"conv_state": torch.rand(3, 6, 3)},
    "conv_state: expected at least 3 tokens, got 2": {"conv_state": torch.rand(2, 6, 2)},
    "conv_state_indices: expected shape (2,)": {"conv_state_indices": torch.tensor([1])},
    "conv_state_indices: expected one of int32, int64": {"conv_state_indices": torch.rand(2)},
    "conv_state_indices: expected rows from 0 to 1": {"conv_state_indices": torch.tensor([2, 1])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = {"x": torch.rand(2, 6), "conv_state": torch.rand(2, 6, 3), "weight": torch.rand(6, 4)}
    with pytest.raises((ValueError, TypeError)) as error:
        causal_conv1d_step(**good | BAD[message])
    assert message in str(error.value)
