"""One token through all layers equals its definition."""

from importlib.util import find_spec

import pytest
import torch
from comparison import DEVICE, TOLERANCES, distance
from ysnake_kernels import backend
from ysnake_kernels.layers_step import layers_step
from ysnake_kernels.layers_step.inputs import LayerWeights
from ysnake_kernels.mixer import MixerSizes
from ysnake_kernels.mixer_step import MixerWeights

FUSED = pytest.param(
    "fused",
    marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux"),
)
D_MODEL, WIDTH = 20, 4
CASES = {
    "one group": {},
    "two groups": {"groups": 2},
    "biases": {"bias": True},
    "steps limited": {"dt_limit": (0.05, 0.2)},
    "a head that forgets": {"rate": -torch.inf},
    "two taps": {"width": 2},
}


def weights(groups=1, bias=False, dt_limit=(0.0, float("inf")), rate=None, width=WIDTH):
    gen = torch.Generator().manual_seed(groups)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    sizes = MixerSizes(d_inner=40, heads=4, groups=groups, state=6)
    A = -randn(4).exp()
    if rate is not None:
        A[1] = rate
    taps, shift = randn(sizes.channels, width), randn(sizes.channels) if bias else None
    inner = (taps, shift, randn(4) - 2, A, randn(4), randn(40))
    features = sum(sizes.projection)
    before = randn(D_MODEL), 1e-3, randn(features, D_MODEL) / 4, randn(features) if bias else None
    after = randn(D_MODEL, 40) / 4, randn(D_MODEL) if bias else None
    return LayerWeights(*before, MixerWeights(*inner, sizes, dt_limit, 1e-2), *after)


def converted(w, dtype, device):
    """The weights in another dtype; the decays and their offsets in float32 at least."""

    def to(t):
        return t.to(device, dtype) if isinstance(t, torch.Tensor) else t

    mixer = MixerWeights(*map(to, w.mixer))
    exact = torch.promote_types(dtype, torch.float32)
    mixer = mixer._replace(A=w.mixer.A.to(device, exact))
    return LayerWeights(*(mixer if t is w.mixer else to(t) for t in w))


def new_states(batch, w, channel_last=True):
    gen = torch.Generator().manual_seed(3)
    sizes, dtype = w.mixer.sizes, w.in_weight.dtype
    width = w.mixer.conv_weight.shape[1]
    conv = torch.randn(batch, width - 1, sizes.channels, generator=gen, dtype=torch.float64).mT
    shape = (batch, sizes.heads, sizes.head_dim, sizes.state)
    ssm = torch.randn(shape, generator=gen, dtype=torch.float64)
    conv = conv.to(w.in_weight.device, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return conv if channel_last else conv.contiguous(), ssm.to(w.in_weight.device, exact)


def after_tokens(name, w, batch, channel_last=True, count=2):
    """The outputs and the states of two layers after some tokens."""
    gen = torch.Generator().manual_seed(7)
    tokens = torch.randn(count, batch, D_MODEL, generator=gen, dtype=torch.float64)
    dtype = torch.promote_types(w.in_weight.dtype, torch.float32)
    tokens = tokens.to(w.in_weight.device, dtype)
    states = [new_states(batch, w, channel_last) for _ in range(2)]
    with backend(name):
        out = [layers_step(h, states, [w, w], w.norm_weight, 1e-3) for h in tokens]
    return torch.stack(out), *states[0], *states[1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["eager", FUSED])
def test_equals_the_reference(case, name):
    w = weights(**case)
    expected = after_tokens("reference", w, 3)
    place = DEVICE if name == "fused" else "cpu"
    channel_last = "bias" not in case
    got = after_tokens(name, converted(w, torch.float64, place), 3, channel_last)
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["eager", FUSED])
def test_accuracy_in_other_dtypes(name, dtype):
    w = converted(weights(bias=True), dtype, "cpu")
    expected = after_tokens("reference", converted(w, torch.float64, "cpu"), 3, count=1)
    place = DEVICE if name == "fused" else "cpu"
    got = after_tokens(name, converted(w, dtype, place), 3, count=1)
    assert got[0].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < 2 * TOLERANCES[dtype][0]


BAD = {
    "h: expected shape (batch, d_model)": {"h": torch.rand(20)},
    "h: expected a contiguous tensor": {"h": torch.rand(20, 3).t()},
    "h: expected float32 or": {"h": torch.rand(3, 20).double()},
    "norm_weight: expected shape (20,)": {"norm_weight": torch.rand(21)},
    "states: expected those of 1 layers, got 0": {"states": []},
    "in_weight: expected shape (96, 20)": {"in_weight": torch.rand(99, 20)},
    "out_weight: expected shape (20, 40)": {"out_weight": torch.rand(40, 20)},
    "in_bias: expected shape (96,)": {"in_bias": torch.rand(99)},
    "out_bias: expected one of float32": {"out_bias": torch.rand(20).half()},
    "conv_state: expected shape (3, 52, 3)": {"conv_state": torch.rand(3, 52, 4)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", ["eager", FUSED])
def test_bad_arguments_are_named(message, name):
    w = converted(weights(), torch.float32, "cpu")
    given = {"h": torch.rand(3, D_MODEL), "states": [new_states(3, w)], "layers": [w]}
    given |= {"norm_weight": w.norm_weight, "eps": 1e-5}
    for key, value in BAD[message].items():
        if key in w._fields:
            given["layers"] = [w._replace(**{key: value})]
        elif key == "conv_state":
            given["states"] = [(value, new_states(3, w)[1])]
        else:
            given[key] = value
    with backend(name), pytest.raises((ValueError, TypeError)) as error:
        layers_step(**given)
    assert message in str(error.value)
