"""The counts of bytes agree with what launches touch, and with sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ysnake_kernels import backend, causal_conv1d, rms_norm_gated, ssd_scan, ssd_step

from benchmarks import traffic

SMALL = traffic.Shape(
    batch=1,
    length=52,
    heads=4,
    groups=2,
    head_dim=8,
    state=6,
    tile=16,
    chunk=32,
    row_tile=16,
    chain_chunk=16,
)


GRAD = {"x", "dt", "A", "B", "C", "z", "weight", "bias"}


def arguments(s):
    """Arguments of a scan of this shape, by name."""
    item = {2: torch.bfloat16, 4: torch.float32}
    sizes = {
        "x": (s.batch, s.length, s.heads, s.head_dim),
        "dt": (s.batch, s.length, s.heads),
        "B": (s.batch, s.length, s.groups, s.state),
        "C": (s.batch, s.length, s.groups, s.state),
        "z": (s.batch, s.length, s.heads, s.head_dim),
    }
    tensors = {
        name: torch.rand(shape, dtype=item[s.dt_item if name == "dt" else s.item])
        for name, shape in sizes.items()
        if name != "z" or s.z
    }
    return tensors | {"A": -torch.rand(s.heads)}


@pytest.fixture
def launches(monkeypatch):
    """A list that every launch joins: its kernel's name, and the arrays of addresses that it reads
    and writes, by the bytes of an element."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    if torch.cuda.is_available():
        pytest.skip("what a launch touches is seen in Triton's interpreter only")
    from triton.runtime import interpreter
    from ysnake_kernels.ssd import fused_plan

    small = fused_plan.Config(tile=16, p_slice=16, warps=4, stages=1, chunk=32)
    monkeypatch.setattr(fused_plan, "TABLE", dict.fromkeys(fused_plan.TABLE, small))
    log = []
    grid, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store = grid.__call__, builder.create_masked_load, builder.create_masked_store

    def touch(kind, pointers, mask):
        item = pointers.get_element_ty().primitive_bitwidth // 8
        log[-1][kind].setdefault(item, []).append(pointers.data[mask.data])

    def launched(self, *args, **kwargs):
        log.append({"name": self.fn.__name__, "reads": {}, "writes": {}})
        return launch(self, *args, **kwargs)

    def loaded(self, pointers, mask, *rest):
        touch("reads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self, pointers, value, mask, *rest):
        touch("writes", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(grid, "__call__", launched)
    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    return log


def assert_counted(launches, kernels):
    """Each launch reads and writes the bytes of the kernel that stands for it; the last kernel may
    be a sum that torch does."""
    assert len(kernels) - len(launches) in (0, 1)
    for launch, kernel in zip(launches, kernels, strict=False):
        for kind in ("reads", "writes"):
            touched = sum(
                item * len(np.unique(np.concatenate([a.ravel() for a in addresses])))
                for item, addresses in launch[kind].items()
            )
            counted = getattr(kernel, kind)
            assert touched == sum(counted.values()), (launch["name"], kind, counted)


def differentiate(launches, operator, tensors, **options):
    """Launches of a forward, and of its backward."""
    leaves = {k: t.requires_grad_(k in GRAD) for k, t in tensors.items()}
    with backend("fused"):
        y = operator(**leaves, **options)
        forward = len(launches)
        torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], torch.ones_like(y))
    return launches[:forward], launches[forward:]


@pytest.mark.parametrize(
    "more",
    [{}, {"z": True, "dt_item": 2, "splits": 2}, {"segments": 3, "back_segments": 3}],
    ids=["plain", "gate, shared groups", "segments"],
)
def test_a_scan_touches_what_is_counted(launches, monkeypatch, more):
    from ysnake_kernels.ssd import fused_backward, fused_forward

    s = replace(SMALL, **more)
    for module, count in ((fused_forward, s.segments), (fused_backward, s.back_segments)):
        monkeypatch.setattr(module, "segments", lambda *args, count=count: count)
    monkeypatch.setattr(fused_backward, "splits_of_group", lambda *args: s.splits)
    forward, backward = differentiate(launches, ssd_scan, arguments(s))
    assert_counted(forward, traffic.forward(s))
    assert_counted(backward, traffic.backward(s))


def test_a_convolution_touches_what_is_counted(launches):
    channels = SMALL.heads * SMALL.head_dim + 2 * SMALL.groups * SMALL.state
    x = torch.rand(SMALL.batch, SMALL.length, channels, dtype=torch.bfloat16).transpose(1, 2)
    tensors = {"x": x, "weight": torch.rand(channels, 4), "bias": torch.rand(channels)}
    forward, backward = differentiate(launches, causal_conv1d, tensors, activation="silu")
    counted = traffic.others(SMALL)
    assert_counted(forward, counted["convolution"])
    assert_counted(backward, counted["convolution, backward"])


def test_a_norm_touches_what_is_counted(launches):
    d_inner = SMALL.heads * SMALL.head_dim
    x, z = torch.rand(2, SMALL.batch, SMALL.length, d_inner, dtype=torch.bfloat16)
    tensors = {"x": x, "weight": torch.rand(d_inner), "z": z.clone()}
    forward, backward = differentiate(launches, rms_norm_gated, tensors)
    counted = traffic.others(SMALL)
    assert_counted(forward, counted["gated norm"])
    assert_counted(backward, counted["gated norm, backward"])


def test_a_step_touches_what_is_counted(launches):
    one = {k: t if k == "A" else t[:, 0] for k, t in arguments(SMALL).items()}
    with backend("fused"):
        ssd_step(torch.rand(SMALL.batch, SMALL.heads, SMALL.head_dim, SMALL.state), **one)
    assert_counted(launches, traffic.others(SMALL)["step"])


def per_token_and_head(kernels, s):
    return sum(k.bytes for k in kernels) / s.token_heads


def test_figures_by_hand():
    """Head size 64, state 128, one group of 24 heads, bfloat16, sequences so long that their ends
    do not count."""
    s = traffic.Shape(length=2**20)
    # dt, two numbers written and read; x, y, B and C
    single = 4 + 8 + 8 + 2 * 128 + 2 * 256 / 24
    assert per_token_and_head(traffic.forward(s), s) == pytest.approx(single, abs=0.05)
    # x twice, y; states written, read, rewritten, read; B and C twice each; C B^T; dt and decays
    chain = 3 * 128 + (128 + 128 + 64 + 64) + 4 * 256 / 24 + 1.5 * 1024 / 24 + 4 + 8 + 8 + 8
    assert per_token_and_head(traffic.chain(s), s) == pytest.approx(chain, abs=0.05)
    # three times x, dy, B, C; dx, dB, dC; of each chunk of 64 tokens the states written, S read
    # twice and dS once; dt twice, ddt; the numbers of a token; of each chunk the flow through it,
    # written and read, shares of dA, and a flow that is not read
    numbers = 3 + 2 + (2 + 1) + (3 + 3) + 4
    # and dB within chunks in float32, written and read
    split = 7 * 128 + 8 * 256 / 24 + 5 * 256 + 12 + 4 * numbers + (8 + 8 - 4) / 64 + 2 * 512 / 24
    assert per_token_and_head(traffic.backward(s), s) == pytest.approx(split, abs=0.05)


def test_partial_sums_of_a_shared_group_are_counted():
    s = traffic.Shape()
    whole, shared = (traffic.backward(replace(s, splits=k)) for k in (1, 24))
    # 24 float32 partials of dB and dC, written and read, instead of one result, and of dB within
    # chunks instead of one
    more = per_token_and_head(shared, s) - per_token_and_head(whole, s)
    assert more == pytest.approx(2 * 2 * 128 * 4 + 2 * 128 * 4 * (1 - 1 / 24))


def test_segments_read_x_and_B_twice():
    s = traffic.Shape(length=2**20)
    more = per_token_and_head(traffic.forward(replace(s, segments=8)), s)
    more -= per_token_and_head(traffic.forward(s), s)
    assert more == pytest.approx(128 + 256 / 24 + 8, abs=2)


def test_prints_a_table_for_a_card(capsys):
    traffic.main(traffic.Shape(), traffic.Card(name="a card", bandwidth=1e12, operations=1e14))
    printed = capsys.readouterr().out
    assert "Backward, split form, per token and head" in printed
    assert "us a call on a card" in printed
