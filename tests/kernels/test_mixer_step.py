"""The mixer for one token equals its definition, and the mixer over a sequence token by token."""

from importlib.util import find_spec

import pytest
import torch
from comparison import DEVICE, distance
from ysnake_kernels import backend, mamba_split_conv1d_scan_combined
from ysnake_kernels.mixer import MixerSizes
from ysnake_kernels.mixer_step import MixerWeights, eager, mixer_step
from ysnake_kernels.norm import rms_norm_gated

FUSED = pytest.param(
    "fused",
    marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux"),
)
BATCH, WIDTH = 3, 4
CASES = {
    "one group": {},
    "two groups": {"groups": 2},
    "no bias": {"bias": False},
    "steps limited": {"dt_limit": (0.05, 0.2)},
    "a head that forgets": {"rate": -torch.inf},
}


def weights(groups=1, bias=True, dt_limit=(0.0, float("inf")), rate=None, dtype=torch.float64):
    gen = torch.Generator().manual_seed(groups)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    sizes = MixerSizes(d_inner=32, heads=4, groups=groups, state=6)
    A = -randn(4).exp()
    if rate is not None:
        A[1] = rate
    taps, shift = randn(sizes.channels, WIDTH), randn(sizes.channels) if bias else None
    parameters = (taps, shift, randn(4) - 2, A, randn(4), randn(32))
    return MixerWeights(*parameters, sizes, dt_limit, 1e-5)


def tokens(length, sizes, dtype=torch.float64):
    gen = torch.Generator().manual_seed(7)
    shape = (BATCH, length, sum(sizes.projection))
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def new_states(sizes, dtype=torch.float64, channel_last=True):
    conv = torch.zeros(BATCH, WIDTH - 1, sizes.channels, dtype=dtype).transpose(1, 2)
    exact = torch.promote_types(dtype, torch.float32)
    ssm = torch.zeros(BATCH, sizes.heads, sizes.head_dim, sizes.state, dtype=exact)
    return conv if channel_last else conv.contiguous(), ssm


def one_by_one(w, zxbcdt, states):
    y = torch.stack([mixer_step(token, *states, w) for token in zxbcdt.unbind(1)], 1)
    return y, *states


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["eager", FUSED])
@pytest.mark.parametrize("channel_last", [True, False])
def test_equals_the_reference(case, name, channel_last):
    w = weights(**case)
    zxbcdt = tokens(5, w.sizes)
    with backend("reference"):
        expected = one_by_one(w, zxbcdt, new_states(w.sizes))
    place = DEVICE if name == "fused" else "cpu"
    w = MixerWeights(*(None if t is None else t.to(place) for t in w[:6]), *w[6:])
    states = [t.to(place) for t in new_states(w.sizes, channel_last=channel_last)]
    with backend(name):
        got = one_by_one(w, zxbcdt.to(place), states)
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < 1e-12


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_mixer_over_a_sequence(case):
    w = weights(**case)
    zxbcdt = tokens(11, w.sizes)
    expected, ssm = mamba_split_conv1d_scan_combined(
        *(zxbcdt, w.conv_weight, w.conv_bias, w.dt_bias, w.A, w.D),
        dt_limit=w.dt_limit,
        return_final_states=True,
        rmsnorm_weight=w.norm_weight,
        rmsnorm_eps=w.eps,
        ngroups=w.sizes.groups,
        norm_before_gate=False,
    )
    y, conv_state, ssm_state = one_by_one(w, zxbcdt, new_states(w.sizes))
    assert distance(y, expected) < 1e-12
    assert distance(ssm_state, ssm) < 1e-12
    assert torch.equal(conv_state, w.sizes.split(zxbcdt)[1][:, -3:].transpose(1, 2))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_accuracy_in_other_dtypes(dtype, bound):
    w = weights(groups=2, dtype=dtype)
    zxbcdt = tokens(6, w.sizes, dtype)
    exact = MixerWeights(*(t.double() for t in w[:6]), *w[6:])
    with backend("reference"):
        expected = one_by_one(exact, zxbcdt.double(), new_states(w.sizes))
    got = one_by_one(w, zxbcdt, new_states(w.sizes, dtype))
    assert got[0].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < bound


@pytest.mark.parametrize("groups", [1, 2])
def test_compiles_whole(groups):
    torch.compiler.reset()
    w = weights(groups, dtype=torch.float32)
    zxbcdt = tokens(1, w.sizes, torch.float32)[:, 0]
    states, expected_states = new_states(w.sizes, torch.float32), new_states(w.sizes, torch.float32)
    expected = mixer_step(zxbcdt, *expected_states, w)
    got = torch.compile(mixer_step, backend="aot_eager", fullgraph=True)(zxbcdt, *states, w)
    for a, b in zip((got, *states), (expected, *expected_states), strict=True):
        torch.testing.assert_close(a, b)


def test_the_norm_of_few_rows():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, generator=gen, dtype=torch.float64)
    weight = torch.randn(12, generator=gen, dtype=torch.float64)
    for groups in (1, 3):
        expected = rms_norm_gated(x, weight, eps=1e-3, group_size=12 // groups)
        got = eager.rms_norm_few_rows(x, weight, x.new_tensor(1e-3), groups)
        assert distance(got, expected) < 1e-14


BAD = {
    "zxbcdt: expected shape (batch, features)": {"zxbcdt": torch.rand(3, 1, 80)},
    "zxbcdt: expected shape (3, 80) to match the sizes": {"zxbcdt": torch.rand(3, 81)},
    "conv_state: expected shape (3, 44, 3)": {"conv_state": torch.rand(3, 44, 4)},
    "ssm_state: expected shape (3, 4, 8, 6)": {"ssm_state": torch.rand(3, 4, 6, 8)},
    "ssm_state: expected one of float32": {"ssm_state": torch.rand(3, 4, 8, 6).double()},
    "ssm_state: expected a contiguous tensor": {"ssm_state": torch.rand(3, 4, 6, 8).mT},
    "conv_weight: expected shape (44, 4)": {"conv_weight": torch.rand(43, 4)},
    "conv_weight: expected a width of at least 2": {"conv_weight": torch.rand(44, 1)},
    "D: expected shape (4,)": {"D": torch.rand(4, 8)},
    "A: expected values <= 0": {"A": torch.rand(4)},
    "dt_limit: expected 0 <= low <= high": {"dt_limit": (2.0, 1.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    w = weights(dtype=torch.float32)
    conv_state, ssm_state = new_states(w.sizes, torch.float32)
    zxbcdt = tokens(1, w.sizes, torch.float32)[:, 0]
    given = {"zxbcdt": zxbcdt, "conv_state": conv_state, "ssm_state": ssm_state, **w._asdict()}
    given |= BAD[message]
    first = [given.pop(name) for name in ("zxbcdt", "conv_state", "ssm_state")]
    with pytest.raises((ValueError, TypeError)) as error:
        mixer_step(*first, MixerWeights(**given))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_rows(name, dtype):
    w = weights(groups=2, dtype=dtype)
    states = [t[:0] for t in new_states(w.sizes, dtype)]
    with backend(name):
        assert mixer_step(tokens(1, w.sizes, dtype)[:0, 0], *states, w).shape == (0, 32)
