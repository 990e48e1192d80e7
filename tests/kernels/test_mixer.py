"""The mixer equals its parts, in outputs and all gradients, and saves only its arguments."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_equals_reference, distance, on_device, outputs_and_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from ysnake_kernels import (
    backend,
    causal_conv1d,
    mamba_split_conv1d_scan_combined,
    rms_norm_gated,
    ssd_scan,
)
from ysnake_kernels.mixer import eager as mixer_eager
from ysnake_kernels.ssd import eager_layout

FUSED = pytest.param(
    "fused",
    marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux"),
)
HEADS, P, N, D_MODEL, LENGTH = 4, 8, 6, 10, 21
D_INNER = HEADS * P


def inputs(groups=1, dtype=torch.float64, norm=True, projection=True, length=LENGTH, **extra):
    gen = torch.Generator().manual_seed(groups)
    channels = D_INNER + 2 * groups * N

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    tensors = {
        "zxbcdt": randn(2, length, D_INNER + channels + HEADS),
        "conv1d_weight": randn(channels, 4),
        "conv1d_bias": randn(channels),
        "dt_bias": randn(HEADS) - 2,
        "A": -randn(HEADS).exp(),
        "D": randn(HEADS, P) if extra.get("D_channel") else randn(HEADS),
    }
    if extra.get("initial_states"):
        tensors["initial_states"] = randn(2, HEADS, P, N)
        tensors["conv_initial_states"] = randn(2, channels, 3)
    if extra.get("seq_idx"):
        tensors["seq_idx"] = torch.tensor([0] * 5 + [1] * 9 + [2] * (length - 14)).repeat(2, 1)
    if norm:
        tensors["rmsnorm_weight"] = randn(D_INNER)
    if projection:
        tensors["outproj_weight"] = randn(D_MODEL, D_INNER)
        tensors["outproj_bias"] = randn(D_MODEL)
    return tensors


def composed(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size=8, ngroups=1, **options):
    """The same from the public operators, written out once more."""
    z, xBC, dt = zxbcdt.tensor_split([D_INNER, zxbcdt.shape[-1] - HEADS], dim=-1)
    seq_idx, norm = options.get("seq_idx"), options.get("rmsnorm_weight")
    xBC = xBC.transpose(1, 2)
    edge = options.get("conv_initial_states")
    xBC = causal_conv1d(xBC, conv1d_weight, conv1d_bias, seq_idx, edge, activation="silu")
    x, B, C = xBC.transpose(1, 2).split([D_INNER, ngroups * N, ngroups * N], dim=-1)
    y, states = ssd_scan(
        x.reshape(*x.shape[:2], HEADS, P),
        dt,
        A,
        B.reshape(*B.shape[:2], ngroups, N),
        C.reshape(*C.shape[:2], ngroups, N),
        chunk_size,
        D,
        z.reshape(*z.shape[:2], HEADS, P) if norm is None else None,
        dt_bias,
        options.get("initial_states"),
        seq_idx,
        dt_softplus=True,
        dt_limit=options.get("dt_limit", (0.0, float("inf"))),
        return_final_states=True,
    )
    y = y.reshape(*y.shape[:2], D_INNER)
    if norm is not None:
        first = options.get("norm_before_gate", True)
        y = rms_norm_gated(y, norm, None, z, 1e-6, D_INNER // ngroups, first)
    if "outproj_weight" in options:
        y = F.linear(y, options["outproj_weight"], options["outproj_bias"])
    return y, states


CASES = {
    "everything": ({"initial_states": True}, {}),
    "no norm, the gate in the scan": ({"norm": False, "initial_states": True}, {}),
    "no projection": ({"projection": False}, {}),
    "no norm, no projection": ({"norm": False, "projection": False}, {"rmsnorm_eps": None}),
    "gate before the norm": ({}, {"norm_before_gate": False}),
    "two groups": ({"groups": 2}, {"ngroups": 2, "norm_before_gate": False}),
    "documents": ({"seq_idx": True, "initial_states": True}, {}),
    "D per channel, headdim given": ({"D_channel": True}, {"headdim": P}),
    "dt_limit": ({}, {"dt_limit": (0.05, 0.2)}),
    "length 1": ({"length": 1}, {}),
}


@pytest.mark.parametrize(("case", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["reference", "eager"])
def test_equals_its_parts(case, options, name):
    check_parts(case, options, name)


@pytest.mark.parametrize("name", [FUSED])
@pytest.mark.parametrize("case", ["no norm, the gate in the scan", "documents"])
def test_equals_its_fused_parts(case, name):
    check_parts(*CASES[case], name)


def check_parts(case, options, name):
    tensors = inputs(**case)
    if name == "fused":
        tensors = on_device(tensors)
    options = {"chunk_size": 8} | options
    with backend(name):
        extra = options | {"return_final_states": True}
        got, gradients, weights = outputs_and_gradients(
            mamba_split_conv1d_scan_combined, tensors, extra, None
        )
        options.pop("headdim", None)
        expected, expected_gradients, _ = outputs_and_gradients(composed, tensors, options, weights)
    for a, b in zip(got, expected, strict=True):
        assert distance(a, b) < 1e-14
    for key, expected_gradient in expected_gradients.items():
        assert distance(gradients[key], expected_gradient) < 1e-14, key


@pytest.mark.parametrize("name", ["eager", FUSED])
def test_equals_reference(name):
    options = {"chunk_size": 8, "return_final_states": True, "norm_before_gate": False}
    tensors = on_device(inputs(dtype=torch.float32, initial_states=True))
    assert_equals_reference(mamba_split_conv1d_scan_combined, tensors, options, name)


@pytest.mark.parametrize("case", ["everything", "gate before the norm", "two groups", "documents"])
def test_rows_of_a_large_batch_go_in_groups(case, monkeypatch):
    case, options = CASES[case]
    extra = {"chunk_size": 8, "return_final_states": True, **options}
    whole = outputs_and_gradients(mamba_split_conv1d_scan_combined, inputs(**case), extra, None)
    monkeypatch.setattr(mixer_eager, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(eager_layout, "PIECE_ELEMENTS", 1)  # and the chunks one by one
    each = outputs_and_gradients(mamba_split_conv1d_scan_combined, inputs(**case), extra, whole[2])
    for a, b in zip(each[0], whole[0], strict=True):
        assert distance(a, b) < 1e-14
    for key, gradient in whole[1].items():
        assert distance(each[1][key], gradient) < 1e-13, key


def test_output_alone():
    tensors = inputs()
    y = mamba_split_conv1d_scan_combined(**tensors, chunk_size=8)
    assert y.shape == (2, LENGTH, D_MODEL)
    assert torch.equal(y, composed(**tensors)[0])


@pytest.mark.parametrize("length", [16, 24, 27])
def test_from_a_state_without_the_one_after_it(length):
    tensors = inputs(length=length, initial_states=True)
    options = {"chunk_size": 8, "norm_before_gate": False}
    assert_equals_reference(mamba_split_conv1d_scan_combined, tensors, options)


class Storages(TorchDispatchMode):
    """Weak references to the memory of all that is computed."""

    def __init__(self):
        super().__init__()
        self.made, self.sizes = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.made.append(StorageWeakRef(t.untyped_storage()))
                self.sizes[self.made[-1].cdata] = t.untyped_storage().nbytes()
        return result

    def alive(self):
        return {ref.cdata for ref in self.made if not ref.expired()}


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_saves_only_its_arguments(norm_before_gate):
    """And, where the norm is merged into the projection, a number for each token."""
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in inputs(seq_idx=True).items()}
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        Storages() as storages,
    ):
        y = mamba_split_conv1d_scan_combined(
            **leaves, chunk_size=8, norm_before_gate=norm_before_gate
        )
    arguments = {StorageWeakRef(t.untyped_storage()).cdata for t in leaves.values()}
    assert {StorageWeakRef(t.untyped_storage()).cdata for t in saved} <= arguments
    kept = storages.alive() - arguments - {StorageWeakRef(y.untyped_storage()).cdata}
    assert [storages.sizes[t] for t in kept] == ([] if norm_before_gate else [2 * LENGTH * 8])
    y.sum().backward()
    assert all(t.grad is not None for t in leaves.values() if t.is_floating_point())


@pytest.fixture
def rounded_products():
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_where_products_are_rounded_so_is_what_is_saved(norm_before_gate, rounded_products):
    options = {"chunk_size": 8, "norm_before_gate": norm_before_gate}
    exact = inputs(initial_states=True)
    given = {k: t.float().requires_grad_() for k, t in exact.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = mamba_split_conv1d_scan_combined(**given, **options)
    zxbcdt, dt = given["zxbcdt"], given["zxbcdt"][..., -len(given["A"]) :]
    assert not any(t.data_ptr() == zxbcdt.data_ptr() for t in saved)
    assert any(torch.equal(t, zxbcdt.bfloat16()) for t in saved)
    assert any(torch.equal(t, dt) for t in saved)
    leaves = {k: t.requires_grad_() for k, t in exact.items()}
    expected = mamba_split_conv1d_scan_combined(**leaves, **options)
    assert distance(y, expected) < 2e-2
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(y, [*given.values()], weight)
    wanted = torch.autograd.grad(expected, [*leaves.values()], weight.double())
    for name, a, b in zip(leaves, got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert distance(a, b) < 5e-2, name


def test_nothing_is_rounded_in_other_dtypes(rounded_products):
    options = {"chunk_size": 8, "norm_before_gate": False}
    assert_equals_reference(mamba_split_conv1d_scan_combined, inputs(), options)


def test_backward_runs_the_implementation_of_forward():
    """Also where the override has ended by then."""
    tensors = {k: t.requires_grad_() for k, t in inputs().items()}
    with backend("reference"):
        y = mamba_split_conv1d_scan_combined(**tensors, chunk_size=8)
        again = mamba_split_conv1d_scan_combined(**tensors, chunk_size=8)
        expected = torch.autograd.grad(again.sum(), [*tensors.values()])
    got = torch.autograd.grad(y.sum(), [*tensors.values()])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_reaches_the_projection_and_its_gradient():
    exact = inputs(dtype=torch.float32)
    mixed = exact | {"zxbcdt": exact["zxbcdt"].bfloat16()}
    results = []
    for operator in (mamba_split_conv1d_scan_combined, composed):
        leaves = {k: t.detach().requires_grad_() for k, t in mixed.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = operator(**leaves, chunk_size=8)
            y = y if isinstance(y, torch.Tensor) else y[0]
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [*leaves.values()])])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert distance(a, b) <= 2e-2


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gradient_of_the_states_alone(norm_before_gate):
    options = {"chunk_size": 8, "norm_before_gate": norm_before_gate}
    gradients = []
    for operator in (mamba_split_conv1d_scan_combined, composed):
        leaves = {k: t.requires_grad_() for k, t in inputs(initial_states=True).items()}
        more = {} if operator is composed else {"return_final_states": True}
        _, states = operator(**leaves, **options, **more)
        read = [leaves[k] for k in ("zxbcdt", "conv1d_weight", "dt_bias", "A", "initial_states")]
        gradients.append(torch.autograd.grad(states.square().sum(), read))
    for ours, expected in zip(*gradients, strict=True):
        assert distance(ours, expected) < 1e-14


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_repeats_to_the_bit(norm_before_gate):
    runs = [
        outputs_and_gradients(
            mamba_split_conv1d_scan_combined,
            inputs(dtype=torch.float32),
            {"chunk_size": 8, "norm_before_gate": norm_before_gate},
            [torch.ones(2, LENGTH, D_MODEL)],
        )
        for _ in range(2)
    ]
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    for key, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][key])


@pytest.mark.parametrize("name", ["eager", FUSED])
@pytest.mark.parametrize("norm_before_gate", [pytest.param(True, marks=pytest.mark.slow), False])
def test_under_compile(name, norm_before_gate):
    torch.compiler.reset()
    tensors = on_device(inputs(dtype=torch.float32))
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}

    def loss(tensors):
        y, states = mamba_split_conv1d_scan_combined(
            **tensors,
            chunk_size=8,
            return_final_states=True,
            norm_before_gate=norm_before_gate,
        )
        return y.square().sum() + states.sum()

    with backend(name):
        expected = torch.autograd.grad(loss(tensors), [*tensors.values()])
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(tensors)
        got = torch.autograd.grad(compiled, [*tensors.values()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "zxbcdt: expected shape (batch, length, features)": {"zxbcdt": torch.rand(2, 80)},
    "zxbcdt: expected channels of conv1d_weight + heads": {"zxbcdt": torch.rand(2, 21, 81)},
    "headdim: expected 8 to match zxbcdt, got 16": {"headdim": 16},
    "ngroups: expected a divisor of 4 heads, got 3": {"ngroups": 3},
    "conv1d_weight: expected d_inner + 2 * ngroups * N": {"ngroups": 4},
    "conv1d_weight: expected shape (channels, width)": {"conv1d_weight": torch.rand(44, 1, 4)},
    "A: expected shape (heads,)": {"A": -torch.rand(4, 1)},
    "rmsnorm_weight: expected shape (32,)": {"rmsnorm_weight": torch.rand(8)},
    "outproj_weight: expected shape (10, 32)": {"outproj_weight": torch.rand(10, 30)},
    "outproj_weight: expected one of float32": {"outproj_weight": torch.rand(10, 32).double()},
    "outproj_bias: expected shape (10,)": {"outproj_bias": torch.rand(32)},
    "outproj_bias: expected an outproj_weight with it": {"outproj_weight": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError)) as error:
        mamba_split_conv1d_scan_combined(**inputs(dtype=torch.float32) | BAD[message])
    assert message in str(error.value)
