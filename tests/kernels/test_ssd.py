"""The scan: `eager` equals `reference` in float64 in output, final state and every gradient."""

from importlib.util import find_spec

import pytest
import torch
from comparison import DTYPES, assert_equals_reference, distance, on_device
from ysnake_kernels import backend, ssd_scan, ssd_step
from ysnake_kernels.ssd import eager_layout

Q = 16  # chunk size of the grid
SEQUENCES = ("x", "dt", "B", "C", "z")
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is for Linux")


def inputs(
    batch=2,
    length=37,
    heads=4,
    head_dim=8,
    groups=1,
    state=6,
    dtype=torch.float64,
    decay="usual",
    **extra,
):
    """Random arguments; `decay` puts exp(dt A) near 1, near 0, or where training starts."""
    gen = torch.Generator().manual_seed(length + heads)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    offset = {"near 1": -9.0, "usual": -2.0, "near 0": 3.0}[decay]
    A = -torch.exp(torch.rand(heads, generator=gen, dtype=torch.float64) * 2)
    tensors = {
        "x": randn(batch, length, heads, head_dim),
        "dt": (randn(batch, length, heads).double() + offset).to(dtype),
        "A": A.to(dtype),
        "B": randn(batch, length, groups, state),
        "C": randn(batch, length, groups, state),
    }
    shapes = {
        "D": (heads,),
        "D_channel": (heads, head_dim),
        "z": (batch, length, heads, head_dim),
        "dt_bias": (heads,),
        "initial_states": (batch, heads, head_dim, state),
    }
    for name, wanted in extra.items():
        if wanted:
            tensors[name.removesuffix("_channel")] = randn(*shapes[name])
    return tensors


OPTIONS = {"dt_softplus": True, "return_final_states": True, "chunk_size": Q}
EVERYTHING = {"D": True, "z": True, "dt_bias": True, "initial_states": True}

CASES = {
    "plain": {},
    "two groups": {"groups": 2},
    "a group per head": {"groups": 4},
    "D per head": {"D": True},
    "D per channel": {"D_channel": True},
    "gate": {"z": True},
    "gate and D": {"z": True, "D": True},
    "dt_bias": {"dt_bias": True},
    "initial states": {"initial_states": True},
    "everything": EVERYTHING,
    "everything, two groups": {**EVERYTHING, "groups": 2},
    "decay near 1": {**EVERYTHING, "decay": "near 1"},
    "decay near 0": {**EVERYTHING, "decay": "near 0"},
    "batch 1, one head": {**EVERYTHING, "batch": 1, "heads": 1},
    "head 1, state 1": {**EVERYTHING, "head_dim": 1, "state": 1},
    "head 1, D per channel": {"D_channel": True, "head_dim": 1},
    **{f"length {n}": {**EVERYTHING, "length": n} for n in (1, 2, Q - 1, Q, Q + 1, 3 * Q + 5)},
    "far longer": {**EVERYTHING, "length": 1000, "batch": 1, "heads": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_equals_reference(case, dtype):
    assert_equals_reference(ssd_scan, inputs(**case, dtype=dtype), OPTIONS)


@pytest.mark.parametrize("chunk", [None, 1, 5, 64, 1000])
def test_any_chunk_size(chunk):
    assert_equals_reference(ssd_scan, inputs(**EVERYTHING), OPTIONS | {"chunk_size": chunk})


@pytest.mark.parametrize("elements", [1, 2048, 4096])  # pieces of 1, 2 and 4 chunks
@pytest.mark.parametrize("length", [4 * Q, 7 * Q, 4 * Q + 5])
@pytest.mark.parametrize("state", [6, 2 * Q + 1])  # backward finds the states, or makes them again
@pytest.mark.parametrize("start", [True, False], ids=["from a state", "from none"])
@pytest.mark.parametrize("end", [True, False], ids=["states returned", "not returned"])
def test_any_pieces(monkeypatch, elements, length, state, start, end):
    monkeypatch.setattr(eager_layout, "PIECE_ELEMENTS", elements)
    tensors = inputs(length=length, state=state, D=True, initial_states=start)
    assert_equals_reference(ssd_scan, tensors, OPTIONS | {"return_final_states": end})


def test_the_final_state_may_be_changed_before_backward():
    tensors = inputs(**EVERYTHING, length=4 * Q)
    tensors["x"].requires_grad_()
    y, _ = ssd_scan(**tensors, **OPTIONS)
    (expected,) = torch.autograd.grad(y.sum(), tensors["x"])
    y, states = ssd_scan(**tensors, **OPTIONS)
    states.detach().zero_()
    (gradient,) = torch.autograd.grad(y.sum(), tensors["x"])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_documents_do_not_see_each_other(groups):
    tensors = inputs(**EVERYTHING, groups=groups)
    lengths = [[5, 11, 1, 16, 4], [37]]  # inside a chunk, across its edge, on it; and one document
    tensors["seq_idx"] = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    )
    assert_equals_reference(ssd_scan, tensors, OPTIONS)


def test_documents_equal_separate_scans():
    tensors = inputs(length=30, D=True)
    seq_idx = torch.tensor([0] * 13 + [1] * 17).repeat(2, 1)
    packed, states = ssd_scan(**tensors, seq_idx=seq_idx, **OPTIONS)
    for span in (slice(0, 13), slice(13, 30)):
        piece = {k: t[:, span] if k in SEQUENCES else t for k, t in tensors.items()}
        alone, last = ssd_scan(**piece, **OPTIONS)
        assert distance(packed[:, span], alone) < 1e-12
    assert distance(states, last) < 1e-12


def test_cu_seqlens_equal_separate_scans():
    tensors = inputs(batch=1, length=30, D=True, z=True)
    starts = torch.randn(3, 4, 8, 6, dtype=torch.float64)
    tensors |= {"cu_seqlens": torch.tensor([0, 1, 13, 30]), "initial_states": starts}
    assert_equals_reference(ssd_scan, tensors, OPTIONS)
    packed, states = ssd_scan(**tensors, **OPTIONS)
    del tensors["cu_seqlens"]
    for k, span in enumerate((slice(0, 1), slice(1, 13), slice(13, 30))):
        piece = {name: t[:, span] if name in SEQUENCES else t for name, t in tensors.items()}
        alone, last = ssd_scan(**piece | {"initial_states": starts[k : k + 1]}, **OPTIONS)
        assert distance(packed[:, span], alone) < 1e-12
        assert distance(states[k], last[0]) < 1e-12


@pytest.mark.parametrize("bounds", [[0, 0, 30], [0, 13, 13, 13, 30], [0, 30, 30]])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("fused", marks=needs_triton)])
def test_an_empty_sequence_ends_where_it_starts(bounds, starts, name):
    tensors = inputs(batch=1, length=30, D=True)
    count = len(bounds) - 1
    before = torch.randn(count, 4, 8, 6, dtype=torch.float64)
    tensors |= {"initial_states": before} if starts else {}
    empty = [k for k in range(count) if bounds[k] == bounds[k + 1]]
    full = [k for k in range(count) if k not in empty]
    tight = tensors | {"cu_seqlens": torch.tensor([0, *(bounds[k + 1] for k in full)])}
    if starts:
        tight["initial_states"] = before[full]
    with backend(name):
        y, states = ssd_scan(**tensors, cu_seqlens=torch.tensor(bounds), **OPTIONS)
        expected, ends = ssd_scan(**tight, **OPTIONS)
    assert distance(y, expected) < 1e-12
    assert distance(states[full], ends) < 1e-12
    assert torch.equal(states[empty], before[empty] if starts else torch.zeros_like(before[empty]))


def test_slices_of_one_projection():
    """Arguments that are strided views of one tensor, as they come out of a projection."""
    batch, length, heads, head_dim, state = 2, 21, 4, 8, 6
    sizes = [heads * head_dim, state, state, heads]
    projection = torch.randn(batch, length, sum(sizes), dtype=torch.float64)
    x, B, C, dt = projection.split(sizes, dim=-1)
    tensors = {
        "x": x.unflatten(-1, (heads, head_dim)),
        "dt": dt,
        "A": -torch.rand(heads, dtype=torch.float64),
        "B": B.unflatten(-1, (1, state)),
        "C": C.unflatten(-1, (1, state)),
    }
    assert_equals_reference(ssd_scan, tensors, OPTIONS)


@pytest.mark.parametrize("length", [Q - 1, 37])
def test_states_that_are_transposed_in_memory(length):
    """Those that enter, and the gradient of those that leave."""
    tensors = inputs(length=length, heads=1, **EVERYTHING)
    tensors["initial_states"] = tensors["initial_states"].mT.contiguous().mT

    def transposed(**arguments):
        y, states = ssd_scan(**arguments)
        return y, states.mT

    assert_equals_reference(transposed, tensors, OPTIONS)


def test_dt_limit():
    tensors = inputs(dt_bias=True)
    assert_equals_reference(ssd_scan, tensors, OPTIONS | {"dt_limit": (0.05, 0.2)})
    assert_equals_reference(ssd_scan, tensors, OPTIONS | {"dt_softplus": False})


def test_gradient_of_output_or_state_alone():
    tensors = inputs(**EVERYTHING)
    assert_equals_reference(ssd_scan, tensors, OPTIONS | {"return_final_states": False})
    no_effect_on_the_state = {name: tensors.pop(name) for name in ("C", "D", "z")}
    assert_equals_reference(
        lambda **kw: ssd_scan(**kw, **no_effect_on_the_state)[1], tensors, OPTIONS
    )


def test_state_carried_from_piece_to_piece():
    tensors = inputs(length=50, **EVERYTHING)
    whole, end = ssd_scan(**tensors, **OPTIONS)
    state, pieces = tensors["initial_states"], []
    for span in (slice(0, 1), slice(1, 20), slice(20, 50)):
        piece = {
            k: t[:, span] if k in ("x", "dt", "B", "C", "z") else t for k, t in tensors.items()
        }
        y, state = ssd_scan(**piece | {"initial_states": state}, **OPTIONS)
        pieces.append(y)
    assert distance(torch.cat(pieces, 1), whole) < 1e-12
    assert distance(state, end) < 1e-12


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_steps_equal_scan(name, groups, dtype):
    tensors = inputs(length=9, groups=groups, dtype=dtype, **EVERYTHING)
    with backend("reference"):
        exact = {k: t.double() for k, t in tensors.items()}
        expected, end = ssd_scan(**exact, **OPTIONS)
    state = tensors["initial_states"].clone()
    with backend(name):
        for t in range(9):
            y = ssd_step(
                state,
                *(tensors[k][:, t] if k != "A" else tensors[k] for k in ("x", "dt", "A", "B", "C")),
                D=tensors["D"],
                z=tensors["z"][:, t],
                dt_bias=tensors["dt_bias"],
                dt_softplus=True,
            )
            assert distance(y, expected[:, t]) < (1e-12 if dtype == torch.float64 else 2e-5)
    assert distance(state, end) < (1e-12 if dtype == torch.float64 else 2e-5)


def test_no_overflow_at_extreme_decays():
    """dt A from 0 to -1e4 inside one chunk: finite, and equal to the reference."""
    tensors = inputs(length=40, heads=2, dtype=torch.float32)
    tensors["dt"] = torch.logspace(-6, 4, 40).view(1, 40, 1).expand(2, 40, 2).contiguous()
    assert_equals_reference(ssd_scan, tensors, OPTIONS | {"dt_softplus": False})


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("exact", ["x", "z", "initial_states"])
def test_states_are_float64_if_any_input_is(name, exact):
    tensors = inputs(dtype=torch.float32, **EVERYTHING)
    tensors[exact] = tensors[exact].double()
    with backend(name):
        assert ssd_scan(**tensors, **OPTIONS)[1].dtype == torch.float64


def test_autocast_keeps_the_decay_exact():
    tensors = inputs(dtype=torch.float32)
    expected = ssd_scan(**tensors, **OPTIONS)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd_scan(**tensors, **OPTIONS)[0], expected)


BAD = {
    "dt: expected shape (2, 37, 4) to match x, got (2, 37, 3)": {"dt": torch.rand(2, 37, 3)},
    "A: expected values <= 0, got a maximum of 1": {"A": torch.ones(4)},
    "A: expected shape (4,)": {"A": -torch.ones(5)},
    "B: expected a number of groups dividing 4 heads, got 3": {"B": torch.rand(2, 37, 3, 6)},
    "C: expected shape (2, 37, 1, 6) to match B": {"C": torch.rand(2, 37, 1, 5)},
    "D: expected shape (4,)": {"D": torch.rand(3)},
    "z: expected shape (2, 37, 4, 8)": {"z": torch.rand(2, 37, 4)},
    "dt_bias: expected shape": {"dt_bias": torch.rand(1)},
    "initial_states: expected shape (2, 4, 8, 6)": {"initial_states": torch.rand(2, 4, 6, 8)},
    "chunk_size: expected at least 1, got 0": {"chunk_size": 0},
    "dt_limit: expected 0 <= low <= high": {"dt_limit": (-1.0, 1.0)},
    "seq_idx: expected shape": {"seq_idx": torch.zeros(2, 36, dtype=torch.int32)},
    "seq_idx: expected one of int32, int64": {"seq_idx": torch.zeros(2, 37)},
    "seq_idx: expected document numbers that never decrease": {
        "seq_idx": torch.arange(37).flip(0).repeat(2, 1)
    },
    "cu_seqlens: expected x with batch 1": {"cu_seqlens": torch.tensor([0, 37])},
    "x: expected shape (batch, length, heads, P)": {"x": torch.rand(2, 37, 32)},
    "x: expected a floating-point tensor": {"x": torch.ones(2, 37, 4, 8, dtype=torch.int64)},
    "x: expected a tensor, got list": {"x": [1.0]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    tensors = inputs(dtype=torch.float32) | {"chunk_size": Q} | BAD[message]
    with pytest.raises((ValueError, TypeError)) as error:
        ssd_scan(**tensors)
    assert message in str(error.value)


def test_bad_cu_seqlens():
    tensors = inputs(batch=1)
    for bounds in ([0, 5], [0, 20, 10, 37], [3, 37]):
        with pytest.raises(ValueError, match="cu_seqlens: expected values from 0"):
            ssd_scan(**tensors, cu_seqlens=torch.tensor(bounds))


def test_bad_backends_are_named(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"backend: expected one of .*, got 'fast'"),
        backend("fast"),
    ):
        pass
    monkeypatch.setenv("YSNAKE_BACKEND", "slow")
    with pytest.raises(ValueError, match=r"YSNAKE_BACKEND: expected one of .*, got 'slow'"):
        ssd_scan(**inputs())


@pytest.mark.parametrize("name", ["eager", pytest.param("fused", marks=needs_triton)])
@pytest.mark.parametrize("resets", [[5], [5, 9, 30, 31, 50]], ids=["one", "several"])
@pytest.mark.parametrize("size", [1e1, 1e4, 1e8])
def test_tokens_after_a_huge_step_keep_their_precision(name, resets, size):
    """A huge dt forgets all before it. It must not blur the decays between the tokens after it."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 64, 1, 8) for _ in range(3))
    dt = torch.rand(1, 64, 1) / 50
    dt[:, resets], x[:, resets] = size, 0
    tensors = on_device({"x": x, "dt": dt, "A": torch.tensor([-1.0]), "B": B, "C": C})
    assert_equals_reference(ssd_scan, tensors, {"return_final_states": True}, name=name)


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("fused", marks=needs_triton)])
def test_an_infinite_rate_forgets_at_every_step_but_one_of_size_zero(name):
    torch.manual_seed(0)
    x, B, C = (torch.rand(1, 20, 1, 8) for _ in range(3))
    dt = torch.ones(1, 20, 1)
    dt[:, 7] = 0
    tensors = on_device({"x": x, "dt": dt, "B": B, "C": C})
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    A = torch.full((1,), -torch.inf, device=x.device)
    with backend(name):
        y = ssd_scan(**leaves, A=A)
    x, B, C = of_inputs = [leaves[key] for key in ("x", "B", "C")]
    gradients = torch.autograd.grad(y.sum(), of_inputs)
    sources = x.clone()
    sources[:, 7] = x[:, 6]  # what token 7 still reads
    scores = (C * torch.cat([B[:, :7], B[:, 6:7], B[:, 8:]], 1)).sum(-1, keepdim=True)
    expected = scores * sources
    torch.testing.assert_close(y.detach(), expected.detach())
    for found, wanted in zip(
        gradients, torch.autograd.grad(expected.sum(), of_inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
