"""The causal convolution: `eager` equals `reference`, and one token at a time equals a sequence."""

import pytest
import torch
from comparison import DTYPES, assert_equals_reference, distance
from ysnake_kernels import causal_conv1d, causal_conv1d_step
from ysnake_kernels.conv import eager


def inputs(
    batch=2, channels=6, length=23, width=4, dtype=torch.float64, channel_last=True, **extra
):
    gen = torch.Generator().manual_seed(length)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    x = randn(batch, length, channels).transpose(1, 2)
    tensors = {
        "x": x if channel_last else x.contiguous(),
        "weight": randn(channels, width),
        "bias": randn(channels),
        "initial_states": randn(batch, channels, width - 1),
    }
    if extra.get("seq_idx"):
        lengths = torch.tensor([1, 2, 7, length - 10])
        tensors["seq_idx"] = torch.arange(4).repeat_interleave(lengths).repeat(batch, 1)
    return {k: t for k, t in tensors.items() if extra.get(k, True)}


CASES = {
    "plain": {"bias": False, "initial_states": False},
    "bias": {"initial_states": False},
    "initial states": {},
    "channels first in memory": {"channel_last": False},
    "documents": {"seq_idx": True},
    "documents, no states": {"seq_idx": True, "initial_states": False},
    "width 2": {"width": 2, "seq_idx": True},
    "width 3": {"width": 3},
    "width 5": {"width": 5, "length": 30},
    "length 1": {"length": 1},
    "length 2": {"length": 2},
    "length 3": {"length": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_reference(case, dtype, activation):
    options = {"activation": activation, "return_final_states": True}
    assert_equals_reference(causal_conv1d, inputs(**case, dtype=dtype), options)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("seq_idx", [False, True], ids=["one document", "documents"])
def test_many_blocks_equal_one(monkeypatch, tokens, seq_idx):
    """Blocks shorter than the width, and of a length that does not divide the sequence."""
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", 2 * 6 * tokens)
    assert_equals_reference(causal_conv1d, inputs(seq_idx=seq_idx), {"activation": "silu"})


def test_pieces_equal_whole():
    tensors = inputs(length=20)
    whole, end = causal_conv1d(**tensors, activation="silu", return_final_states=True)
    state, pieces = tensors["initial_states"], []
    for span in (slice(0, 1), slice(1, 3), slice(3, 20)):
        piece = tensors | {"x": tensors["x"][:, :, span], "initial_states": state}
        y, state = causal_conv1d(**piece, activation="silu", return_final_states=True)
        pieces.append(y)
    assert distance(torch.cat(pieces, 2), whole) < 1e-12
    assert torch.equal(state, end)


def test_steps_equal_sequence():
    tensors = inputs(length=8)
    x, state = tensors["x"], tensors["initial_states"].clone()
    whole = causal_conv1d(**tensors, activation="silu")
    for t in range(8):
        y = causal_conv1d_step(x[:, :, t], state, tensors["weight"], tensors["bias"], "silu")
        assert distance(y, whole[:, :, t]) < 1e-12
    assert torch.equal(state, x[:, :, -3:])


def test_final_states_hold_the_last_document_only():
    x = torch.randn(1, 2, 5)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1]])
    _, state = causal_conv1d(x, torch.randn(2, 4), seq_idx=seq_idx, return_final_states=True)
    assert torch.equal(state[:, :, :2], torch.zeros(1, 2, 2))
    assert torch.equal(state[:, :, 2], x[:, :, 4])


BAD = {
    "x: expected shape (batch, channels, length)": {"x": torch.rand(2, 6)},
    "weight: expected shape (6, 4)": {"weight": torch.rand(5, 4)},
    "weight: expected a width of at least 2": {"weight": torch.rand(6, 1)},
    "bias: expected shape (6,)": {"bias": torch.rand(4)},
    "activation: expected None, 'silu' or 'swish', got 'relu'": {"activation": "relu"},
    "initial_states: expected shape (2, 6, 3)": {"initial_states": torch.rand(2, 6, 4)},
    "seq_idx: expected shape (2, 23)": {"seq_idx": torch.zeros(2, 6, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        causal_conv1d(**inputs(dtype=torch.float32) | BAD[message])
    assert message in str(error.value)
