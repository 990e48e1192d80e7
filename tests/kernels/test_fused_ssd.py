"""The fused scan equals `reference` in output, final state and every gradient, on a GPU where there
is one and else in Triton's interpreter; launches, saved bytes, determinism, torch.compile.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from comparison import TOLERANCES, assert_equals_reference, distance
from test_ssd import CASES, EVERYTHING, OPTIONS, inputs
from ysnake_kernels import backend, ssd_scan
from ysnake_kernels.ssd import fused, fused_backward, fused_forward, fused_plan
from ysnake_kernels.ssd.fused_plan import Config, segments
from ysnake_kernels.ssd.inputs import ScanInputs, SequenceGradients
from ysnake_kernels.triton_launch import Launcher
from ysnake_kernels.triton_products import arithmetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (fused_forward, fused_backward)
SMALL = {"batch": 1, "heads": 2, "length": 37}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Tiles of 16 and chunks of 32 tokens, slices of 16 channels: short inputs have several."""
    torch.manual_seed(0)  # the weights of the outputs in a comparison
    if "table" not in request.keywords:
        small = Config(tile=16, p_slice=16, warps=4, stages=1, chunk=32)
        monkeypatch.setattr(fused_plan, "TABLE", dict.fromkeys(fused_plan.TABLE, small))


def cut(monkeypatch, count):
    """Cut every sequence into `count` segments."""
    for module in MODULES:
        monkeypatch.setattr(module, "segments", lambda *args: count)


def check(tensors, options=OPTIONS):
    tensors = {k: t.to(DEVICE) for k, t in tensors.items()}
    assert_equals_reference(ssd_scan, tensors, options, name="fused")


def documents(*rows):
    """seq_idx of rows of document lengths."""
    return torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in rows]
    ).int()


def small(case):
    """The case with 20 tokens, one chunk. With more than three options 37 tokens, two chunks."""
    heads = {} if "groups" in case else {"heads": 2}
    return {"batch": 1, "length": 37 if len(case) > 3 else 20} | heads | case


GRID = {
    name: small(case)
    for name, case in CASES.items()
    if name not in ("far longer", "batch 1, one head")
} | {
    "four chunks": {**EVERYTHING, **SMALL, "length": 101},
    "batch 2": EVERYTHING | {"heads": 1},
    "head 20, state 17": {**EVERYTHING, **SMALL, "head_dim": 20, "state": 17},
    "D and gate per channel, slices": {
        **SMALL,
        "D_channel": True,
        "z": True,
        "head_dim": 33,
        "length": 20,
    },
}


@pytest.mark.parametrize("case", GRID.values(), ids=GRID)
def test_equals_reference(case):
    check(inputs(**case))


@pytest.mark.parametrize("decay", ["near 0", "near 1"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
def test_equals_reference_in(dtype, decay):
    """With several heads, since the dA of one head may cancel to less than its rounding error."""
    shape = {"batch": 1, "heads": 4, "groups": 2, "length": 20}
    check(inputs(**EVERYTHING, **shape, decay=decay, dtype=dtype))


@pytest.mark.table
def test_the_table_s_own_tiles():
    check(inputs(**EVERYTHING | SMALL | {"length": 140, "heads": 4}, dtype=torch.bfloat16))


@pytest.mark.parametrize("count", [1, 3])
def test_documents_do_not_see_each_other(monkeypatch, count):
    """Documents that end inside a tile, or at the end of a tile, chunk or segment; and only one."""
    cut(monkeypatch, count)
    tensors = inputs(length=80, **EVERYTHING, heads=1)
    check(tensors | {"seq_idx": documents([5, 11, 1, 15, 32, 6, 10], [80])})


@pytest.mark.parametrize("count", [1, 3])
def test_packed_sequences(monkeypatch, count):
    cut(monkeypatch, count)
    tensors = inputs(length=80, **EVERYTHING | {"initial_states": False}, batch=1, heads=2)
    tensors["cu_seqlens"] = torch.tensor([0, 1, 13, 45, 80], dtype=torch.int32)
    tensors["initial_states"] = torch.randn(4, 2, 8, 6, dtype=torch.float64)
    check(tensors)


@pytest.mark.parametrize("length", [3, 101])
def test_segments(monkeypatch, length):
    cut(monkeypatch, 3)
    check(inputs(**EVERYTHING | SMALL | {"length": length}))


def test_segments_only_where_they_fill_the_gpu():
    assert segments(8, 24, 1, 2048, 132) == 1
    assert segments(1, 24, 1, 512, 132) == 1
    assert segments(1, 24, 1, 16384, 132) == 11
    assert segments(1, 1, 1, 10**6, 132) == fused_plan.MOST_SEGMENTS
    assert segments(4, 8, 1, 4 * 2048, 132) == 4  # tokens of all sequences, 2048 each


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_heads_shared_among_programs(monkeypatch, splits):
    monkeypatch.setattr(fused_backward, "splits_of_group", lambda *args: splits)
    check(inputs(**EVERYTHING, batch=1, length=20))


def test_slices_of_one_projection():
    batch, length, heads, head_dim, state = 1, 21, 2, 8, 6
    sizes = [heads * head_dim, heads * head_dim, state, state, heads]
    projection = torch.randn(batch, length, sum(sizes), dtype=torch.float64)
    x, z, B, C, dt = projection.split(sizes, dim=-1)
    check(
        {
            "x": x.unflatten(-1, (heads, head_dim)),
            "z": z.unflatten(-1, (head_dim, heads)).transpose(2, 3),
            "dt": dt,
            "A": -torch.rand(heads, dtype=torch.float64),
            "B": B.unflatten(-1, (1, state)),
            "C": C.unflatten(-1, (1, state)),
        }
    )


def test_single_tokens_that_are_transposed_in_memory():
    """torch calls them contiguous, with a stride of the batch that is smaller than a token's."""
    tensors = inputs(batch=3, length=1, heads=2)
    for name in ("x", "dt", "B", "C"):
        t = tensors[name]
        tensors[name] = t.reshape(1, 3, *t.shape[2:]).transpose(0, 1)
        assert tensors[name].stride(0) < tensors[name].stride(1)
    check(tensors)


def test_gradients_of_single_tokens_go_into_slices_of_a_larger_tensor():
    """torch gives slices of length 1 other strides than the tensor's."""
    given = ScanInputs(**inputs(batch=3, length=1, heads=2, dtype=torch.float32))
    given = ScanInputs(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given))
    dy = torch.randn_like(given.x)
    sizes = [16, 6, 6, 2]
    dx, dB, dC, ddt = torch.full((3, 1, 30), torch.nan, device=DEVICE).split(sizes, 2)
    shaped = (dx.unflatten(2, (2, 8)), ddt, dB.unflatten(2, (1, 6)), dC.unflatten(2, (1, 6)))
    fused_backward.backward(dy, None, given, SequenceGradients(*shaped))
    expected = fused_backward.backward(dy, None, given)
    for grad, name in zip(shaped, ("x", "dt", "B", "C"), strict=True):
        assert torch.equal(grad, getattr(expected, name)), name


def test_dt_limit():
    tensors = inputs(dt_bias=True, **SMALL)
    check(tensors, OPTIONS | {"dt_limit": (0.05, 0.2)})
    check(tensors, OPTIONS | {"dt_softplus": False})


def test_no_overflow_at_extreme_decays():
    tensors = inputs(**SMALL, dtype=torch.float32)
    tensors["dt"] = torch.logspace(-6, 4, 37).view(1, 37, 1).expand(1, 37, 2).contiguous()
    check(tensors, OPTIONS | {"dt_softplus": False})


def test_gradient_of_the_state_alone():
    tensors = inputs(**EVERYTHING, **SMALL)
    others = {name: tensors.pop(name).to(DEVICE) for name in ("C", "D", "z")}
    tensors = {k: t.to(DEVICE) for k, t in tensors.items()}
    assert_equals_reference(
        lambda **kw: ssd_scan(**kw, **others)[1], tensors, OPTIONS, name="fused"
    )
    with backend("fused"):
        x = tensors["x"].requires_grad_()
        y = ssd_scan(**tensors, **others, **OPTIONS | {"return_final_states": False})
        y.sum().backward()
    assert x.grad.isfinite().all()


# How it runs


@pytest.mark.parametrize(("count", "expected"), [(1, (2, 5)), (3, (3, 6))])
def test_launches(monkeypatch, count, expected):
    log, launch = [], Launcher.__call__

    def counted(self, *arguments):
        log.append(self.kernel)
        launch(self, *arguments)

    monkeypatch.setattr(Launcher, "__call__", counted)
    cut(monkeypatch, count)
    tensors = {k: t.to(DEVICE).requires_grad_() for k, t in inputs(**EVERYTHING, **SMALL).items()}
    with backend("fused"):
        y = ssd_scan(**tensors, **OPTIONS | {"return_final_states": False})
        forward = len(log)
        y.sum().backward()
    assert (forward, len(log) - forward) == expected


def test_saves_the_inputs():
    tensors = {k: t.to(DEVICE) for k, t in inputs(**EVERYTHING, length=64, batch=1).items()}
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.nbytes
        return t

    with backend("fused"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd_scan(**leaves, **OPTIONS)
    given = sum(t.nbytes for t in leaves.values())
    assert given <= sum(saved.values()) <= 1.5 * given


def test_same_bits_twice():
    tensors = inputs(**EVERYTHING, **SMALL, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = {k: t.to(DEVICE).detach().requires_grad_() for k, t in tensors.items()}
        with backend("fused"):
            y, states = ssd_scan(**leaves, **OPTIONS)
        grads = torch.autograd.grad(y.float().sum() + states.sum(), list(leaves.values()))
        runs.append((y, states, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def operator_arguments(**extra):
    small = SMALL | {"heads": 1, "length": 2}
    t = {k: v.to(DEVICE) for k, v in inputs(**extra, **small, dtype=torch.float32).items()}
    return tuple(ScanInputs(**{k: v.requires_grad_() for k, v in t.items()}, dt_softplus=True))


def test_custom_operator():
    torch.library.opcheck(fused._scan, operator_arguments(**EVERYTHING))


def test_under_compile():
    tensors = {k: t.to(DEVICE) for k, t in inputs(**EVERYTHING, **SMALL).items()}

    def loss(**kwargs):
        y, states = ssd_scan(**kwargs, **OPTIONS)
        return y.square().sum() + states.sum()

    with backend("fused"):
        results = []
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
            results.append(torch.autograd.grad(function(**leaves), list(leaves.values())))
    assert all(distance(a, b) < 1e-12 for a, b in zip(*results, strict=True))


def test_autocast_keeps_the_decay_exact():
    tensors = {k: t.to(DEVICE) for k, t in inputs(**SMALL, dtype=torch.float32).items()}
    with backend("fused"):
        expected = ssd_scan(**tensors, **OPTIONS)[0]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(ssd_scan(**tensors, **OPTIONS)[0], expected)
        mixed = tensors | {k: tensors[k].bfloat16() for k in ("x", "B", "C")}
        y = ssd_scan(**mixed, **OPTIONS)[0]
    assert y.dtype == torch.bfloat16
    assert distance(y, expected) <= TOLERANCES[torch.bfloat16][0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"head_dim": 257}, "x: expected a head size of at most 256, got 257"),
        ({"state": 300}, "B: expected a state size of at most 256, got 300"),
    ],
)
def test_sizes_beyond_the_kernels_raise_before_a_launch(monkeypatch, sizes, message):
    monkeypatch.setattr(Launcher, "__call__", None)
    tensors = {k: t.to(DEVICE) for k, t in inputs(**SMALL | {"length": 2}, **sizes).items()}
    with backend("fused"), pytest.raises(ValueError, match=message):
        ssd_scan(**tensors)


def test_bad_cu_seqlens():
    tensors = {k: t.to(DEVICE) for k, t in inputs(batch=1).items()}
    with backend("fused"), pytest.raises(ValueError, match="cu_seqlens: expected values from 0"):
        ssd_scan(**tensors, cu_seqlens=torch.tensor([0, 20, 10, 37]))


@pytest.fixture
def restore_precision():
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # clears the newer setting ...
    torch.set_float32_matmul_precision("highest")  # ... so that the older one answers again


def precision():
    given = ScanInputs(**inputs(**SMALL, dtype=torch.float32))
    return fused_plan.constants(given, 1, "sm_90").PRECISION


@pytest.mark.usefixtures("restore_precision")
def test_float32_precision_follows_both_settings_of_torch():
    assert precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    assert precision() == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert precision() == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert precision() == "tf32"


def test_tf32_only_where_the_gpu_has_it():
    of = {f: arithmetic(f, False, *[torch.float16] * 3) for f in ("gfx942", "gfx1100")}
    assert {family: numbers[2] for family, numbers in of.items()} == {
        "gfx942": "tf32",
        "gfx1100": "ieee",
    }


@pytest.mark.parametrize("softplus", [False, True])
def test_a_nan_in_dt_is_not_hidden(softplus):
    tensors = {k: t.to(DEVICE) for k, t in inputs(**SMALL).items()}
    tensors["dt"][0, 3, 1] = torch.nan
    with backend("fused"):
        y = ssd_scan(**tensors, dt_softplus=softplus)
    assert y[0, 3:, 1].isnan().all()
    assert y[0, :, 0].isfinite().all()
