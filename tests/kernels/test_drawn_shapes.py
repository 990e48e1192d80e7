"""Operators on drawn shapes, options, strides: `eager` equals `reference`, gradients included.

Gradients are compared in float64, which is precise enough for those that nearly cancel.
"""

import pytest
import torch
from comparison import TOLERANCES, assert_equals_reference, distance
from hypothesis import given, settings
from hypothesis import strategies as st
from ysnake_kernels import (
    causal_conv1d,
    causal_conv1d_step,
    mamba_split_conv1d_scan_combined,
    rms_norm_gated,
    ssd_scan,
    ssd_step,
)

EXAMPLES = [25, pytest.param(1000, marks=pytest.mark.slow)]
small = st.integers(1, 6)
EXACT = (torch.float64,)
BOTH = (torch.float64, torch.float32)


def tensors(draw, dtype, shapes, optional=()):
    """Random tensors, the optional ones as drawn; some lie in memory with their axes swapped."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    out = {}
    for name, shape in shapes.items():
        if name in optional and not draw(st.booleans(), label=name):
            continue
        swap = len(shape) > 1 and draw(st.booleans(), label=f"{name} transposed")
        t = torch.randn([*shape[:-2], shape[-1], shape[-2]] if swap else shape, generator=gen)
        out[name] = (t.transpose(-1, -2) if swap else t).to(dtype)
    return out


def documents(draw, batch, length):
    """seq_idx: document numbers that never decrease."""
    rows = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    return torch.tensor([draw(rows) for _ in range(batch)]).cumsum(1).int()


@st.composite
def scans(draw, dtypes=EXACT):
    dtype, groups, batch = draw(st.sampled_from(dtypes)), draw(small), draw(small)
    length = draw(st.integers(1, 40))
    heads, head_dim, n = groups * draw(st.integers(1, 3)), draw(small), draw(small)
    packed = draw(st.sampled_from(["no", "seq_idx", "cu_seqlens"]))
    bounds = [0, length]
    if packed == "cu_seqlens":
        batch = 1
        bounds = sorted({0, length, *draw(st.lists(st.integers(1, length), max_size=3))})
    sequences = len(bounds) - 1 if packed == "cu_seqlens" else batch
    shapes = {
        "x": (batch, length, heads, head_dim),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, groups, n),
        "C": (batch, length, groups, n),
        "D": draw(st.sampled_from([(heads,), (heads, head_dim)])),
        "z": (batch, length, heads, head_dim),
        "dt_bias": (heads,),
        "initial_states": (sequences, heads, head_dim, n),
    }
    drawn = tensors(draw, dtype, shapes, ("D", "z", "dt_bias", "initial_states"))
    drawn["A"] = -drawn["A"].exp()
    options = {
        "chunk_size": draw(st.none() | st.integers(1, 50)),
        "dt_softplus": draw(st.booleans()),
        "dt_limit": draw(st.sampled_from([(0.0, float("inf")), (0.1, 0.7)])),
        "return_final_states": True,
    }
    if packed == "seq_idx":
        options["seq_idx"] = documents(draw, batch, length)
    if packed == "cu_seqlens":
        options["cu_seqlens"] = torch.tensor(bounds)
    return drawn, options


@st.composite
def convolutions(draw, dtypes=EXACT):
    batch, channels, length = draw(small), draw(small), draw(st.integers(1, 20))
    width = draw(st.integers(2, 5))
    shapes = {
        "x": (batch, channels, length),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_states": (batch, channels, width - 1),
    }
    drawn = tensors(draw, draw(st.sampled_from(dtypes)), shapes, ("bias", "initial_states"))
    options = {"activation": draw(st.sampled_from([None, "silu"])), "return_final_states": True}
    if draw(st.booleans()):
        options["seq_idx"] = documents(draw, batch, length)
    return drawn, options


@st.composite
def norms(draw):
    groups, size = draw(small), draw(small)
    features = groups * size
    lead = draw(st.lists(st.integers(0, 4), max_size=3))
    shapes = {"x": (*lead, features), "weight": (features,), "bias": (features,)}
    drawn = tensors(draw, torch.float64, shapes | {"z": (*lead, features)}, ("bias", "z"))
    return drawn, {"group_size": size, "norm_before_gate": draw(st.booleans()), "eps": 1e-2}


@st.composite
def mixers(draw):
    groups, batch, length = draw(st.integers(1, 3)), draw(small), draw(st.integers(1, 20))
    heads, head_dim, n = groups * draw(st.integers(1, 2)), draw(small), draw(small)
    d_inner, d_model = heads * head_dim, draw(small)
    channels, width = d_inner + 2 * groups * n, draw(st.integers(2, 4))
    shapes = {
        "zxbcdt": (batch, length, d_inner + channels + heads),
        "conv1d_weight": (channels, width),
        "conv1d_bias": (channels,),
        "dt_bias": (heads,),
        "A": (heads,),
        "D": (heads,),
        "rmsnorm_weight": (d_inner,),
        "outproj_weight": (d_model, d_inner),
        "initial_states": (batch, heads, head_dim, n),
        "conv_initial_states": (batch, channels, width - 1),
    }
    left_out = [name for name in shapes if name not in ("zxbcdt", "conv1d_weight", "A")]
    drawn = tensors(draw, torch.float64, shapes, left_out)
    drawn["A"] = -drawn["A"].exp()
    options = {"chunk_size": draw(st.none() | st.integers(1, 30)), "ngroups": groups}
    options |= dict.fromkeys({"conv1d_bias", "dt_bias", "D"} - set(drawn))
    return drawn, options | {"norm_before_gate": draw(st.booleans()), "rmsnorm_eps": 1e-2}


CASES = {
    "scan": (ssd_scan, scans()),
    "convolution": (causal_conv1d, convolutions()),
    "norm": (rms_norm_gated, norms()),
    "mixer": (mamba_split_conv1d_scan_combined, mixers()),
}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(("operator", "cases"), CASES.values(), ids=CASES)
def test_eager_equals_reference(operator, cases, examples):
    @settings(max_examples=examples)
    @given(cases)
    def check(case):
        torch.manual_seed(0)  # of the weights that gradients are taken with
        assert_equals_reference(operator, *case)

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_token_by_token_equals_the_sequence(examples):
    @settings(max_examples=examples)
    @given(scans(BOTH), convolutions(BOTH))
    def check(scan, convolution):
        drawn, options = scan
        if not {"seq_idx", "cu_seqlens"} & set(options):
            y, last = ssd_scan(**drawn, **options)
            state = drawn.pop("initial_states", torch.zeros_like(last)).contiguous().clone()
            kept = {k: drawn.pop(k) for k in ("A", "D", "dt_bias") if k in drawn}
            kept |= {k: options[k] for k in ("dt_softplus", "dt_limit")}
            steps = [
                ssd_step(state, **{k: t[:, i] for k, t in drawn.items()}, **kept)
                for i in range(y.shape[1])
            ]
            tolerance = TOLERANCES[y.dtype][0]
            assert distance(torch.stack(steps, 1), y) <= tolerance
            assert distance(state, last) <= tolerance
        drawn, options = convolution
        if "seq_idx" not in options:
            y, last = causal_conv1d(**drawn, **options)
            state = drawn.pop("initial_states", torch.zeros_like(last)).clone()
            x = drawn.pop("x").unbind(-1)
            steps = [
                causal_conv1d_step(t, state, **drawn, activation=options["activation"]) for t in x
            ]
            assert distance(torch.stack(steps, -1), y) <= TOLERANCES[y.dtype][0]
            assert torch.equal(state, last)

    check()
