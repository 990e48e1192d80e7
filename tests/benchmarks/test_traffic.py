"""The counts of bytes agree with the tensors that a call has, and with sums done by hand."""

from dataclasses import replace

import pytest
import torch
from ysnake_kernels import causal_conv1d, rms_norm_gated, ssd_scan, ssd_step

from benchmarks import traffic

SMALL = traffic.Shape(batch=2, length=48, heads=4, groups=2, head_dim=8, state=6, chain_chunk=16)


def call(s):
    """Arguments and results of a call of this shape, by name."""
    item = {2: torch.bfloat16, 4: torch.float32}
    sizes = {
        "x": (s.batch, s.length, s.heads, s.head_dim),
        "dt": (s.batch, s.length, s.heads),
        "B": (s.batch, s.length, s.groups, s.state),
        "C": (s.batch, s.length, s.groups, s.state),
        "z": (s.batch, s.length, s.heads, s.head_dim),
    }
    arguments = {
        name: torch.rand(shape, dtype=item[s.dt_item if name == "dt" else s.item])
        for name, shape in sizes.items()
        if name != "z" or s.z
    }
    arguments["A"] = -torch.rand(s.heads)
    y, states = ssd_scan(**arguments, return_final_states=True)
    return arguments, {"y": y, "final states": states}


@pytest.mark.parametrize("z", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("dt_item", [2, 4])
def test_forward_counts_the_tensors_of_a_call(z, dt_item):
    s = replace(SMALL, z=z, dt_item=dt_item)
    arguments, results = call(s)
    (kernel,) = traffic.forward(s)
    assert kernel.reads == {name: t.nbytes for name, t in arguments.items()}
    assert kernel.writes == {name: t.nbytes for name, t in results.items()}


def test_small_operators_count_the_tensors_of_a_call():
    s = replace(SMALL, dt_item=2)
    conv, _, norm, _, step = traffic.others(s)
    d_inner = s.heads * s.head_dim
    channels = d_inner + 2 * s.groups * s.state
    x = torch.rand(s.batch, s.length, channels, dtype=torch.bfloat16).transpose(1, 2)
    assert conv.bytes == x.nbytes + causal_conv1d(x, torch.rand(channels, 4)).nbytes
    x = torch.rand(s.batch, s.length, d_inner, dtype=torch.bfloat16)
    y = rms_norm_gated(x, torch.rand(d_inner), z=x.clone())
    assert norm.bytes == 2 * x.nbytes + y.nbytes
    arguments, results = call(s)
    one = {k: t if k == "A" else t[:, 0] for k, t in arguments.items()}
    state = results["final states"]
    y = ssd_step(state, **one)
    moved = sum(t.nbytes for k, t in one.items() if k != "A")
    assert step.bytes == 2 * state.nbytes + moved + y.nbytes


def per_token_and_head(kernels, s):
    return sum(k.bytes for k in kernels) / s.token_heads


def test_figures_by_hand():
    """Head size 64, state 128, one group of 24 heads, bfloat16, sequences so long that their ends
    do not count."""
    s = traffic.Shape(length=2**20)
    assert per_token_and_head(traffic.forward(s), s) == pytest.approx(281.33, abs=0.05)
    # x twice, y; states written, read, rewritten, read; B and C twice each; C B^T; dt and decays
    chain = 3 * 128 + (128 + 128 + 64 + 64) + 4 * 256 / 24 + 1.5 * 1024 / 24 + 4 + 8 + 8 + 8
    assert per_token_and_head(traffic.chain(s), s) == pytest.approx(chain, abs=0.05)
    # twice x, dy, B, C; dx, dB, dC; states twice written and read; dt three times, ddt; scratch
    split = 5 * 128 + 6 * 256 / 24 + 4 * 128 + 16 + 2 * (8 + 16)
    assert per_token_and_head(traffic.backward(s), s) == pytest.approx(split, abs=0.05)


def test_partial_sums_of_a_shared_group_are_counted():
    s = traffic.Shape()
    whole, shared = (traffic.backward(replace(s, splits=k)) for k in (1, 24))
    # 24 float32 partials of dB and dC, written and read, instead of one result
    more = per_token_and_head(shared, s) - per_token_and_head(whole, s)
    assert more == pytest.approx(2 * 2 * 128 * 4)


def test_segments_read_x_and_B_twice():
    s = traffic.Shape(length=2**20)
    more = per_token_and_head(traffic.forward(replace(s, segments=8)), s)
    more -= per_token_and_head(traffic.forward(s), s)
    assert more == pytest.approx(128 + 256 / 24 + 4, abs=2)


def test_prints_a_table_for_a_card(capsys):
    traffic.main(traffic.Shape(), traffic.Card(name="a card", bandwidth=1e12, operations=1e14))
    printed = capsys.readouterr().out
    assert "Backward, split form, per token and head" in printed
    assert "us a call on a card" in printed
