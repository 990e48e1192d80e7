"""The list of bad arguments of every public operator: each raises an error that names one.

The same arguments are good before one of them is replaced.
"""

import pytest
import torch
from ysnake_kernels import (
    causal_conv1d,
    causal_conv1d_step,
    mamba_split_conv1d_scan_combined,
    rms_norm_gated,
    ssd_scan,
    ssd_step,
)
from ysnake_kernels.dropin import functions as dropin

rand, ones, zeros = torch.rand, torch.ones, torch.zeros
meta = {"device": "meta"}

SCAN = {"x": rand(2, 7, 4, 8), "dt": rand(2, 7, 4), "A": -rand(4)}
SCAN |= {"B": rand(2, 7, 2, 6), "C": rand(2, 7, 2, 6)}
STEP = {"state": rand(2, 4, 8, 6), "x": rand(2, 4, 8), "dt": rand(2, 4), "A": -rand(4)}
STEP |= {"B": rand(2, 2, 6), "C": rand(2, 2, 6)}
CONV = {"x": rand(2, 6, 7), "weight": rand(6, 4)}
CONV_STEP = {"x": rand(2, 6), "conv_state": rand(2, 6, 3), "weight": rand(6, 4)}
NORM = {"x": rand(3, 5, 12), "weight": rand(12)}
MIXER = {"zxbcdt": rand(2, 7, 32 + 44 + 4), "conv1d_weight": rand(44, 4), "A": -rand(4)}
MIXER |= {"conv1d_bias": rand(44), "dt_bias": rand(4), "D": rand(4)}
UPDATE = {"state": rand(2, 5, 3), "x": rand(2, 5), "dt": rand(2, 5), "A": -rand(5, 3)}
UPDATE |= {"B": rand(2, 3), "C": rand(2, 3)}
OF_HEADS = {"state": rand(2, 4, 8, 6), "x": rand(2, 4, 8), "dt": rand(2, 4, 1).expand(2, 4, 8)}
OF_HEADS |= {"A": -rand(4, 1, 1).expand(4, 8, 6), "B": rand(2, 2, 6), "C": rand(2, 2, 6)}

GOOD = [
    (ssd_scan, SCAN),
    (ssd_step, STEP),
    (causal_conv1d, CONV),
    (causal_conv1d_step, CONV_STEP),
    (rms_norm_gated, NORM),
    (mamba_split_conv1d_scan_combined, MIXER),
    (dropin.causal_conv1d_fn, CONV),
    (dropin.causal_conv1d_update, CONV_STEP),
    (dropin.mamba_chunk_scan_combined, SCAN | {"chunk_size": 4}),
    (dropin.mamba_split_conv1d_scan_combined, MIXER | {"chunk_size": 4}),
    (dropin.selective_state_update, UPDATE),
    (dropin.selective_state_update, OF_HEADS),
    (dropin.rmsnorm_fn, NORM | {"bias": None}),
]

SEQUENCE = {  # of both ways to call the scan
    "x: expected a length of at least 1, got 0": {"x": rand(2, 0, 4, 8), "dt": rand(2, 0, 4)},
    "dt: expected a tensor, got float": {"dt": 0.1},
    "dt: expected device cpu to match x, got meta": {"dt": rand(2, 7, 4, **meta)},
    "dt: expected one of float64": {"dt": ones(2, 7, 4).long()},
    "A: expected values <= 0": {"A": rand(4) + 0.1},
    "B: expected shape (batch, length, groups, N)": {"B": rand(2, 7, 6)},
    "B: expected a number of groups dividing 4 heads, got 0": {"B": rand(2, 7, 0, 6)},
    "B: expected shape (2, 7, 2, 6)": {"B": rand(2, 8, 2, 6)},
    "C: expected a tensor, got NoneType": {"C": None},
    "D: expected a tensor, got float": {"D": 1.0},
    "D: expected shape (4, 8)": {"D": rand(4, 7)},
    "z: expected device cpu": {"z": rand(2, 7, 4, 8, **meta)},
    "dt_bias: expected a tensor, got int": {"dt_bias": 1},
    "initial_states: expected shape (2, 4, 8, 6)": {"initial_states": rand(1, 4, 8, 6)},
    "seq_idx: expected a tensor, got list": {"seq_idx": [0] * 7},
    "cu_seqlens: expected a tensor, got list": {"cu_seqlens": [0, 7]},
    "dt_limit: expected 0 <= low <= high, got (1.0, nan)": {"dt_limit": (1.0, torch.nan)},
    "dt_limit: expected two numbers, got (0.0,)": {"dt_limit": (0.0,)},
    "dt_limit: expected two numbers, got None": {"dt_limit": None},
}
LIST = [
    *((ssd_scan, SCAN, message, bad) for message, bad in SEQUENCE.items()),
    *(
        (dropin.mamba_chunk_scan_combined, SCAN | {"chunk_size": 4}, message, bad)
        for message, bad in SEQUENCE.items()
    ),
    *(
        (ssd_scan, SCAN, message, bad)
        for message, bad in {
            "chunk_size: expected at least 1, got -1": {"chunk_size": -1},
            "chunk_size: expected a whole number, got 16.0": {"chunk_size": 16.0},
            "chunk_size: expected a whole number, got '16'": {"chunk_size": "16"},
        }.items()
    ),
    *(
        (ssd_step, STEP, message, bad)
        for message, bad in {
            "x: expected a tensor, got NoneType": {"x": None},
            "x: expected shape (batch, heads, P)": {"x": rand(2, 32)},
            "state: expected a tensor, got NoneType": {"state": None},
            "state: expected device cpu": {"state": rand(2, 4, 8, 6, **meta)},
            "state: expected a contiguous tensor": {"state": rand(2, 4, 6, 8).mT},
            "dt: expected shape (2, 4)": {"dt": rand(2, 1)},
            "A: expected values <= 0": {"A": rand(4) + 0.1},
            "B: expected a number of groups dividing 4 heads, got 3": {"B": rand(2, 3, 6)},
            "B: expected shape (2, 2, 6)": {"B": rand(3, 2, 6)},
            "C: expected shape (2, 2, 6) to match B": {"C": rand(2, 2, 5)},
            "D: expected a tensor, got float": {"D": 1.0},
            "z: expected shape (2, 4, 8)": {"z": rand(2, 4)},
            "dt_bias: expected shape (4,)": {"dt_bias": rand(2, 4)},
            "dt_limit: expected 0 <= low <= high": {"dt_limit": (-1.0, 1.0)},
            "dt_limit: expected two numbers": {"dt_limit": 3},
            "state_batch_indices: expected a tensor, got list": {"state_batch_indices": [0, 1]},
            "state_batch_indices: expected rows from 0 to 1": {
                "state_batch_indices": torch.tensor([-2, 1])
            },
        }.items()
    ),
    *(
        (operator, CONV, message, bad)
        for operator in (causal_conv1d, dropin.causal_conv1d_fn)
        for message, bad in {
            "x: expected a tensor, got list": {"x": [[1.0]]},
            "x: expected a length of at least 1, got 0": {"x": rand(2, 6, 0)},
            "weight: expected a tensor, got NoneType": {"weight": None},
            "weight: expected shape (channels, width)": {"weight": rand(6, 1, 4)},
            "weight: expected a floating-point tensor": {"weight": ones(6, 4).int()},
            "weight: expected device cpu": {"weight": rand(6, 4, **meta)},
            "bias: expected a tensor, got bool": {"bias": True},
            "initial_states: expected shape (2, 6, 3)": {"initial_states": rand(2, 3, 6)},
            "seq_idx: expected one of int32, int64": {"seq_idx": zeros(2, 7)},
            "seq_idx: expected document numbers that never decrease": {
                "seq_idx": torch.arange(7).flip(0).repeat(2, 1)
            },
            "activation: expected None, 'silu' or 'swish', got True": {"activation": True},
        }.items()
    ),
    *(
        (operator, CONV_STEP, message, bad)
        for operator in (causal_conv1d_step, dropin.causal_conv1d_update)
        for message, bad in {
            "conv_state: expected a tensor, got NoneType": {"conv_state": None},
            "weight: expected a tensor, got float": {"weight": 0.5},
            "weight: expected shape (6, 4)": {"weight": rand(5, 4)},
            "bias: expected shape (6,)": {"bias": rand(1)},
            "activation: expected None, 'silu' or 'swish', got 'gelu'": {"activation": "gelu"},
            "conv_state_indices: expected no row twice": {
                "conv_state_indices": torch.tensor([0, 0])
            },
            "conv_state_indices: expected rows from 0 to 1": {
                "conv_state_indices": torch.tensor([0, 2])
            },
        }.items()
    ),
    *(
        (dropin.causal_conv1d_update, CONV_STEP, message, bad)
        for message, bad in {
            "x: expected shape (batch, channels, tokens), got (6,)": {"x": rand(6)},
            "conv_state: expected at least 3 tokens, got 2": {"conv_state": rand(2, 6, 2)},
            "conv_state: expected shape (2, 6, 5)": {"conv_state": rand(2, 5, 5)},
            "cache_seqlens: expected shape (2,)": {"cache_seqlens": torch.tensor([3])},
            "cache_seqlens: expected one of int32, int64": {"cache_seqlens": rand(2)},
            "conv_state_indices: expected rows from 0 to 1 ": {
                "conv_state_indices": torch.tensor([0, 2]),
                "conv_state": rand(2, 6, 5),
            },
        }.items()
    ),
    *(
        (operator, NORM | more, message, bad)
        for operator, more in ((rms_norm_gated, {}), (dropin.rmsnorm_fn, {"bias": None}))
        for message, bad in {
            "x: expected a floating-point tensor, got NoneType": {"x": None},
            "x: expected shape (..., features)": {"x": torch.tensor(1.0)},
            "weight: expected device cpu": {"weight": rand(12, **meta)},
            "weight: expected one of float64": {"weight": ones(12).int()},
            "bias: expected a tensor, got float": {"bias": 0.0},
            "group_size: expected a divisor of 12 features, got 0": {"group_size": 0},
            "group_size: expected a whole number, got 4.0": {"group_size": 4.0},
            "eps: expected a number, got None": {"eps": None},
        }.items()
    ),
    *(
        (operator, MIXER | more, message, bad)
        for operator, more in (
            (mamba_split_conv1d_scan_combined, {}),
            (dropin.mamba_split_conv1d_scan_combined, {"chunk_size": 4}),
        )
        for message, bad in {
            "zxbcdt: expected a tensor, got NoneType": {"zxbcdt": None},
            "zxbcdt: expected a floating-point tensor": {"zxbcdt": ones(2, 7, 80).int()},
            "A: expected a tensor, got float": {"A": -1.0},
            "A: expected at least 1 head, got 0": {"A": -rand(0)},
            "conv1d_bias: expected shape (44,)": {"conv1d_bias": rand(4)},
            "dt_bias: expected shape (4,)": {"dt_bias": rand(44)},
            "D: expected a tensor, got int": {"D": 1},
            "activation: expected None, 'silu' or 'swish', got 'relu'": {"activation": "relu"},
            "ngroups: expected a whole number, got 1.0": {"ngroups": 1.0},
            "rmsnorm_weight: expected a tensor, got list": {"rmsnorm_weight": [1.0]},
            "outproj_weight: expected shape (d_model, d_inner)": {"outproj_weight": rand(32)},
            "seq_idx: expected shape (2, 7)": {"seq_idx": zeros(2, 6).int()},
            "dt_limit: expected 0 <= low <= high": {"dt_limit": (2.0, 1.0)},
        }.items()
    ),
    (
        *(mamba_split_conv1d_scan_combined, MIXER),
        *("conv_initial_states: expected shape (2, 44, 3)", {"conv_initial_states": rand(2, 44)}),
    ),
    *(
        (dropin.selective_state_update, UPDATE, message, bad)
        for message, bad in {
            "x: expected a tensor, got NoneType": {"x": None},
            "x: expected shape (batch, channels), got (2,)": {"x": rand(2)},
            "state: expected shape (2, 5, 3)": {"state": rand(2, 4, 3)},
            "dt: expected shape (2, 5)": {"dt": rand(2, 1)},
            "A: expected shape (5, 3)": {"A": -rand(5)},
            "B: expected shape (2, 3)": {"B": rand(2, 4)},
            "C: expected shape (2, 3)": {"C": rand(3)},
            "D: expected shape (5,)": {"D": rand(1, 5)},
            "z: expected shape (2, 5)": {"z": rand(5)},
            "dt_bias: expected shape (5,)": {"dt_bias": rand(1)},
            "state_batch_indices: expected rows from 0 to 1": {
                "state_batch_indices": torch.tensor([5, 0])
            },
        }.items()
    ),
    *(
        (dropin.selective_state_update, OF_HEADS, message, bad)
        for message, bad in {
            "state: expected shape (2, 4, 8, 6)": {"state": rand(2, 4, 6)},
            "state: expected a tensor, got list": {"state": []},
            "A: expected shape (4, 8, 6)": {"A": -rand(4)},
            "dt: expected shape (2, 4, 8)": {"dt": rand(2, 4)},
            "dt_bias: expected shape (4, 8)": {"dt_bias": rand(4)},
            "B: expected a number of groups dividing 4 heads, got 3": {"B": rand(2, 3, 6)},
        }.items()
    ),
]


def name(value):
    return value.__name__ if callable(value) else value if isinstance(value, str) else ""


@pytest.mark.parametrize(("operator", "arguments"), GOOD, ids=name)
def test_the_arguments_are_good(operator, arguments):
    operator(**{k: t.clone() if torch.is_tensor(t) else t for k, t in arguments.items()})


@pytest.mark.parametrize(("operator", "arguments", "message", "bad"), LIST, ids=name)
def test_bad_arguments_are_named(operator, arguments, message, bad):
    with pytest.raises((ValueError, TypeError)) as error:
        operator(**arguments | bad)
    assert message.rstrip() in str(error.value)


def test_the_list_is_long():
    assert len(LIST) >= 60
