"""Padding, with the index -1: its output is zero, and it changes no state and no other row."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from comparison import on_device
from ysnake_kernels import backend, causal_conv1d_step, ssd_step
from ysnake_kernels.dropin import functions

NAMES = [
    "reference",
    "eager",
    pytest.param(
        "fused", marks=pytest.mark.skipif(not find_spec("triton"), reason="Triton is for Linux")
    ),
]
ROWS = torch.tensor([3, -1, 0, -1], dtype=torch.int32)
USED = [0, 2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(call, state, tensors, rows=ROWS):
    """call(state, tensors, rows) skips padding. Other rows are as they are without padding."""
    tensors, state, rows = on_device(tensors), state.to(rows.device), rows
    expected_state, padded_state = state.clone(), state.clone()
    expected = call(expected_state, {k: t[USED] for k, t in tensors.items()}, rows[USED])
    y = call(padded_state, tensors, rows)
    assert torch.equal(y[USED], expected)
    assert not y[[1, 3]].any()
    assert torch.equal(padded_state, expected_state)
    assert torch.equal(padded_state[[1, 2, 4]], state[[1, 2, 4]])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_state(name):
    heads = on_device({"A": -torch.rand(2), "D": torch.rand(2)})
    rows = on_device({"rows": ROWS})["rows"]
    tensors = {"x": torch.randn(4, 2, 3), "dt": torch.rand(4, 2), "z": torch.randn(4, 2, 3)}
    tensors |= {"B": torch.randn(4, 1, 5), "C": torch.randn(4, 1, 5)}

    def call(state, t, rows):
        with backend(name):
            return ssd_step(state, **t, **heads, state_batch_indices=rows)

    check(call, torch.randn(5, 2, 3, 5), tensors, rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_convolution(name):
    weight = on_device({"weight": torch.randn(6, 4)})["weight"]
    rows = on_device({"rows": ROWS})["rows"]

    def call(state, t, rows):
        with backend(name):
            return causal_conv1d_step(t["x"], state, weight, None, "silu", rows)

    check(call, torch.randn(5, 6, 3), {"x": torch.randn(4, 6)}, rows)


@pytest.mark.parametrize("seqlens", [False, True])
def test_the_convolution_s_update_of_several_tokens(seqlens):
    weight = torch.randn(6, 4)
    tensors = {"x": torch.randn(4, 6, 2)}
    if seqlens:
        tensors["cache_seqlens"] = torch.tensor([1, 5, 7, 2], dtype=torch.int32)

    def call(state, t, rows):
        return functions.causal_conv1d_update(
            t["x"], state, weight, None, "silu", t.get("cache_seqlens"), rows
        )

    check(call, torch.randn(5, 6, 5), tensors)


@pytest.mark.parametrize("expanded", [False, True])
def test_the_update_of_a_state(expanded):
    """With rates of each channel, and with Mamba-2's, one for each head."""
    A, dt = -torch.rand(2, 3, 5), torch.rand(4, 2, 3)
    if expanded:
        A, dt = -torch.rand(2, 1, 1).expand(2, 3, 5), torch.rand(4, 2, 1).expand(4, 2, 3)
    x, B, C = torch.randn(4, 2, 3), torch.randn(4, 1, 5), torch.randn(4, 1, 5)

    def call(state, t, rows):
        steps = t["dt"][..., :1].expand(-1, -1, 3) if expanded else t["dt"]
        return functions.selective_state_update(
            state, t["x"], steps, A, t["B"], t["C"], state_batch_indices=rows
        )

    check(call, torch.randn(5, 2, 3, 5), {"x": x, "dt": dt, "B": B, "C": C})


def test_tokens_behind_the_last_document():
    x, weight = torch.randn(1, 4, 8), torch.randn(4, 4)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1]], dtype=torch.int32)
    y = functions.causal_conv1d_fn(x, weight, None, seq_idx, activation="silu")
    alone = functions.causal_conv1d_fn(x[..., :6], weight, None, seq_idx[:, :6], activation="silu")
    assert torch.equal(y[..., :6], alone)
    assert not y[..., 6:].any()


def of_state():
    tensors = torch.randn(4, 2, 3), torch.rand(4, 2), -torch.rand(2)
    BC = torch.randn(2, 4, 1, 5)
    call = partial(ssd_step, D=torch.rand(2), z=torch.randn(4, 2, 3))
    return torch.randn(5, 2, 3, 5), lambda s, rows: call(s, *tensors, *BC, state_batch_indices=rows)


def of_channels():
    x, dt, A = torch.randn(4, 6), torch.rand(4, 6), -torch.rand(6, 5)
    BC, call = torch.randn(2, 4, 5), functions.selective_state_update
    return torch.randn(5, 6, 5), lambda s, rows: call(s, x, dt, A, *BC, state_batch_indices=rows)


def of_convolution(size=3):
    x, weight = torch.randn(4, 6), torch.randn(6, 4)

    def call(state, rows):
        return causal_conv1d_step(x, state, weight, None, "silu", rows)

    return torch.randn(5, 6, size), call


def of_several_tokens():
    x, weight, seqlens = torch.randn(4, 6, 2), torch.randn(6, 4), torch.tensor([1, 5, 7, 2])
    call = partial(functions.causal_conv1d_update, x, cache_seqlens=seqlens)
    return torch.randn(5, 6, 5), lambda s, rows: call(s, weight, conv_state_indices=rows)


STEPS = (of_state, of_channels, of_convolution, partial(of_convolution, 5), of_several_tokens)


@pytest.mark.parametrize("rows", [[3, -1, 0, -1], [-1, 4, -1, 2], [3, 1, 0, 2], [-1] * 4], ids=str)
@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("step", STEPS)
def test_compiled_steps_do_not_look_at_the_rows(step, name, rows):
    torch.compiler.reset()
    (state, call), rows = step(), torch.tensor(rows)
    expected_state, padded_state = state.clone(), state.clone()
    with backend(name):
        expected = call(expected_state, rows)
        y = torch.compile(call, backend="aot_eager", fullgraph=True)(padded_state, rows)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(padded_state, expected_state)
    others = [row for row in range(5) if row not in rows.tolist()]
    assert torch.equal(padded_state[others], state[others])
