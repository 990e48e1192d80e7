"""Standing in for mamba_ssm and causal-conv1d: under transformers' models, and by itself."""

import platform
from importlib.util import find_spec

import pytest
import torch
from fresh_process import python
from ysnake_kernels import ssd_scan, ssd_step
from ysnake_kernels.dropin import blocks, norms
from ysnake_kernels.dropin import functions as f
from ysnake_kernels.dropin.for_transformers import convolve
from ysnake_kernels.dropin.mamba_1 import Mamba
from ysnake_kernels.dropin.modules import Mamba2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_once_a_model_trains_unless_told_not_to(keep):
    before, after = python(f"""
import torch
import ysnake_kernels.dropin
for _ in range(2):
    ysnake_kernels.dropin.install(keep_freed_memory={keep})
def given_back():
    large = torch.ones(25_000_000)
    before = resident()
    del large
    return before - resident()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
print(given_back())
weight = torch.ones(1, requires_grad=True)
weight.sum().backward()
optimizer = torch.optim.SGD([weight])
optimizer.step()
optimizer.step()
print(given_back())
""").split()
    assert int(before) > 90e6
    assert (int(after) < 1e6) if keep else (int(after) > 90e6)


def test_what_can_be_imported():
    python("""
import importlib.util, inspect, pickle
import ysnake_kernels.dropin as dropin
dropin.install()
dropin.install()
import causal_conv1d, mamba_ssm
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm import Mamba, Mamba2, selective_scan_fn
from mamba_ssm.modules.mamba2 import Mamba2 as same
from mamba_ssm.modules.mamba_simple import Mamba as same_mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as same_scan
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.layernorm_gated import LayerNorm, layernorm_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm as AddingRMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.modules.block import Block
from mamba_ssm.utils.generation import InferenceParams
from causal_conv1d import causal_conv1d_varlen_states
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states as same_states
assert AddingRMSNorm is not RMSNorm and same_states is causal_conv1d_varlen_states
assert Mamba is same_mamba and selective_scan_fn is same_scan
assert Mamba2 is same and mamba_ssm.ops.triton.layernorm_gated.RMSNorm is RMSNorm
for module in (causal_conv1d, mamba_ssm):
    assert importlib.util.find_spec(module.__name__).name == module.__name__
    assert module.__file__ and not hasattr(module, "__wrapped__")
for function in (causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn, Mamba, Mamba2):
    kinds = {p.kind.name for p in inspect.signature(function).parameters.values()}
    assert kinds == {"POSITIONAL_OR_KEYWORD"}
assert pickle.loads(pickle.dumps(selective_state_update)) is selective_state_update

refused = {
    "from mamba_ssm import mamba_inner_fn": "use selective_scan_fn, or Mamba",
    "from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn": "use selective_scan_fn",
    "import mamba_ssm.modules.mamba3": "",
    "from mamba_ssm import MambaLMHeadModel": "load its checkpoints",
    "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel": "load its checkpoints",
    "from mamba_ssm.ops.triton.layernorm_gated import GroupNorm": "",
    "from mamba_ssm.utils.generation import decode": "",
    "from causal_conv1d import cpp_functions": "",
}
for statement, reason in refused.items():
    try:
        exec(statement)
    except ModuleNotFoundError as error:
        assert "not offered by ysnake_kernels.dropin" in str(error), error
        assert reason in str(error), error
        assert error.name in ("mamba_ssm", "causal_conv1d")
    else:
        raise AssertionError(statement)

for name in ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"):
    module = importlib.import_module(name)
    assert not hasattr(module, "Mamba0") and getattr(module, "Mamba0", 3) == 3
    try:
        module.Mamba0
    except AttributeError as error:
        assert f"{name}.Mamba0: not offered by ysnake_kernels.dropin" in str(error), error
""")


def test_programs_that_look_through_all_modules_still_work():
    """pickle does, to find out where a function without a module comes from."""
    python("""
import inspect, pickle, sys, types
import ysnake_kernels.dropin
ysnake_kernels.dropin.install()
late = sys.modules["late"] = types.ModuleType("late")
exec("def function(): pass", late.__dict__)
late.function.__module__ = None
assert pickle.loads(pickle.dumps(late.function)) is late.function
for name in [n for n in sys.modules if n.startswith(("mamba_ssm", "causal_conv1d"))]:
    inspect.getmembers(sys.modules[name])
""")


def test_the_real_packages_come_first_unless_forced(tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("real = True\n")
    python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import ysnake_kernels.dropin as dropin
dropin.install()
import causal_conv1d, mamba_ssm
assert mamba_ssm.real and causal_conv1d.causal_conv1d_fn
try:
    dropin.install(force=True)
except RuntimeError as error:
    assert "mamba_ssm has been imported already" in str(error)
else:
    raise AssertionError
del sys.modules["mamba_ssm"]
dropin.install(force=True)
from mamba_ssm import Mamba2
""")


@pytest.mark.skipif(
    bool(find_spec("mamba_ssm") or find_spec("causal_conv1d")), reason="the real ones are installed"
)
def test_installing_after_a_model_was_imported_raises():
    pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    python("""
import ysnake_kernels.dropin
import transformers.models.mamba2.modeling_mamba2
try:
    ysnake_kernels.dropin.install()
except RuntimeError as error:
    message = "transformers.models.mamba2.modeling_mamba2 has been imported already"
    assert message in str(error)
else:
    raise AssertionError
""")


def test_only_modules_of_transformers_get_the_functions_made_for_them():
    """The name of the module that imports a function decides which one it gets."""
    python("""
import sys, types
import ysnake_kernels.dropin
ysnake_kernels.dropin.install()
import causal_conv1d, mamba_ssm
from ysnake_kernels.dropin import functions
code = '''
import causal_conv1d, mamba_ssm
convolution = causal_conv1d.causal_conv1d_fn
whole_mamba_1 = getattr(mamba_ssm, "mamba_inner_fn", None)
mixer = mamba_ssm.mamba_split_conv1d_scan_combined
'''
found = {}
for name in ("transformers.models.new.modeling_new", "someone.else"):
    module = types.ModuleType(name)
    exec(compile(code, name, "exec"), module.__dict__)
    found[name.partition(".")[0]] = module
assert found["someone"].convolution is functions.causal_conv1d_fn
assert found["someone"].mixer is functions.mamba_split_conv1d_scan_combined
assert found["transformers"].convolution is not functions.causal_conv1d_fn
assert found["transformers"].mixer(1, 2, activation="silu") is None
assert found["transformers"].whole_mamba_1(1, 2) is None and found["someone"].whole_mamba_1 is None
""")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_convolution_token_by_token_equals_the_sequence(size, width, tokens):
    x, weight, bias = random(3, 5, 18), random(5, width, seed=1), random(5, seed=2)
    expected, last = f.causal_conv1d_fn(x, weight, bias, None, None, True, activation="silu")
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    states, ring = torch.zeros(6, 5, size), torch.zeros(3, 5, size)
    shared, many = [], []
    for start in range(0, 18, tokens):
        piece = x[:, :, start : start + tokens]
        piece = piece[:, :, 0] if tokens == 1 else piece
        shared.append(
            f.causal_conv1d_update(
                piece, states, weight, bias, "silu", conv_state_indices=rows
            ).view(3, 5, -1)
        )
        seen = torch.full((3,), start, dtype=torch.int32)
        y = f.causal_conv1d_update(piece, ring, weight, bias, "silu", cache_seqlens=seen)
        many.append(y.view(3, 5, -1))
    torch.testing.assert_close(torch.cat(shared, 2), expected)
    torch.testing.assert_close(torch.cat(many, 2), expected)
    torch.testing.assert_close(states[rows.long()], x[:, :, -size:])
    torch.testing.assert_close(ring.roll(-(18 % size), 2), x[:, :, -size:])
    assert not states[[1, 3, 5]].any()
    torch.testing.assert_close(last, x[:, :, 1 - width :])
    out = torch.empty_like(last)
    y, same = f.causal_conv1d_fn(x, weight, bias, None, None, True, out, "silu")
    assert same is out
    torch.testing.assert_close(out, last)


def heads(batch=3, h=4, p=6, n=5, g=2):
    x, z, dt = (random(batch, h, p, seed=s) for s in (0, 1, 2))
    B, C = (random(batch, g, n, seed=s) for s in (3, 4))
    A, D, bias = -random(h, p, n, seed=5).exp(), random(h, p, seed=6), random(h, p, seed=7)
    return random(batch, h, p, n, seed=8), x, dt, A, B, C, D, z, bias


def by_hand(state, x, dt, A, B, C, D, z, bias):
    """The recurrence, written out in torch. All tensors have shape (batch, channels, ...)."""
    dt = torch.nn.functional.softplus(dt + bias)
    S = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    return ((S * C).sum(-1) + D * x) * torch.nn.functional.silu(z), S


def test_state_update_with_one_decay_per_channel():
    state, x, dt, A, B, C, D, z, bias = heads()
    wide = [t.repeat_interleave(2, 1)[:, :, None] for t in (B, C)]
    y, S = by_hand(state, x, dt, A, *wide, D, z, bias)
    rows, more = torch.tensor([5, 1, 2]), torch.zeros(6, 4, 6, 5)
    more[rows] = state
    ours = f.selective_state_update(more, x, dt, A, B, C, D, z, bias, True, rows)
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(more[rows], S)
    assert not more[[0, 3, 4]].any()


def test_state_update_of_repeated_values_is_that_of_copies():
    """Without softplus steps may be negative: then nothing limits them."""
    torch.manual_seed(0)
    state, x, B, C = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4), *torch.randn(2, 1, 1, 3)
    dt = -torch.rand(1, 2, 1).expand(1, 2, 4)
    A = -torch.rand(2, 1, 1).expand(2, 4, 3)
    repeated = f.selective_state_update(state.clone(), x, dt, A, B, C)
    copied = f.selective_state_update(state.clone(), x, dt.contiguous(), A.contiguous(), B, C)
    torch.testing.assert_close(repeated, copied)


def test_state_update_of_mamba_1():
    state, x, dt, A, _, _, D, z, bias = (t[:, 0] if t.ndim > 2 else t[0] for t in heads())
    A = -random(6, 5, seed=5).exp()
    B, C = random(3, 5, seed=3), random(3, 5, seed=4)
    y, S = by_hand(state, x, dt, A, B[:, None], C[:, None], D, z, bias)
    state = state.clone()
    torch.testing.assert_close(f.selective_state_update(state, x, dt, A, B, C, D, z, bias, True), y)
    torch.testing.assert_close(state, S)
    grouped = f.selective_state_update(
        S.clone(), x, dt, A, B[:, None], C[:, None], D, z, bias, True
    )
    torch.testing.assert_close(
        grouped, f.selective_state_update(S, x, dt, A, B, C, D, z, bias, True)
    )


@pytest.mark.parametrize("strided", [False, True])
def test_state_update_with_repeated_decays_is_one_step_of_the_scan(strided):
    state, x, dt, A, B, C, D, z, bias = heads()
    dt, A, bias = dt[..., 0], A[:, 0, 0], bias[:, 0]
    expected = state.clone()
    y = ssd_step(expected, x, dt, A, B, C, D, z, bias, True)
    if strided:
        state = state.transpose(2, 3).contiguous().transpose(2, 3)
    ours = f.selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, 6),
        A[:, None, None].expand(-1, 6, 5),
        B,
        C,
        D,
        z,
        bias[:, None].expand(-1, 6),
        True,
    )
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(state, expected)


def test_scan_with_states_after_each_packed_sequence():
    x, dt = random(1, 20, 4, 6), random(1, 20, 4, seed=1)
    A, B, C = -random(4, seed=2).exp(), random(1, 20, 2, 5, seed=3), random(1, 20, 2, 5, seed=4)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 7 + [1] + [2] * 12], dtype=torch.int32)
    expected, states = ssd_scan(
        x, dt, A, B, C, cu_seqlens=bounds, dt_softplus=True, return_final_states=True
    )
    shared = {"chunk_size": 256, "dt_softplus": True}
    for options in ({}, {"seq_idx": seq_idx}):
        y, final, each = f.mamba_chunk_scan_combined(
            x,
            dt,
            A,
            B,
            C,
            cu_seqlens=bounds,
            return_final_states=True,
            return_varlen_states=True,
            **shared,
            **options,
        )
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(each, states)
        torch.testing.assert_close(final, states[-1:])
    y = f.mamba_chunk_scan_combined(x, dt, A, B, C, seq_idx=seq_idx, **shared)
    torch.testing.assert_close(y, expected)
    with pytest.raises(ValueError, match="return_varlen_states: expected cu_seqlens"):
        f.mamba_chunk_scan_combined(x, dt, A, B, C, return_varlen_states=True, **shared)


class Remembered:
    """What mamba_ssm's InferenceParams are to a layer."""

    def __init__(self):
        self.key_value_memory_dict, self.seqlen_offset = {}, 0


BLOCKS = {
    "default": {},
    "groups, no norm": {"ngroups": 2, "rmsnorm": False, "bias": True, "conv_bias": False},
    "D for every channel": {"D_has_hdim": True, "norm_before_gate": True},
    "half a gated unit": {"d_ssm": 32, "conv_init": 0.5},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_mamba2_block_as_a_whole_in_parts_and_token_by_token(options):
    torch.manual_seed(0)
    block = Mamba2(32, d_state=16, headdim=8, layer_idx=0, **options)
    u = random(2, 12, 32)
    whole = block(u)
    whole.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    assert all(g.any() for g in gradients.values())
    block.zero_grad()
    block.use_mem_eff_path = False
    parts = block(u.flatten(0, 1), seqlen=12).view_as(whole)
    parts.square().sum().backward()
    torch.testing.assert_close(parts, whole)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        for first in (2, 7):  # fewer tokens than the convolution is wide, and more
            memory = Remembered()
            out = [block(u[:, :first], inference_params=memory)]
            for t in range(first, 12):
                memory.seqlen_offset = t
                out.append(block(u[:, t : t + 1], inference_params=memory))
            torch.testing.assert_close(torch.cat(out, 1), whole)


@pytest.mark.parametrize("dt_init", ["random", "constant"])
def test_mamba_block_token_by_token_equals_the_sequence(dt_init):
    block = Mamba(32, d_state=8, layer_idx=0, dt_init=dt_init)
    u = random(2, 12, 32)
    whole = block(u)
    whole.square().sum().backward()
    assert all(p.grad.any() for p in block.parameters())
    with torch.no_grad():
        for first in (2, 7):  # fewer tokens than the convolution is wide, and more
            memory = Remembered()
            out = [block(u[:, :first], inference_params=memory)]
            for t in range(first, 12):
                memory.seqlen_offset = t
                out.append(block(u[:, t : t + 1], inference_params=memory))
            torch.testing.assert_close(torch.cat(out, 1), whole)


def test_a_mamba_block_computes_what_transformers_does():
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 1}
    theirs, block = MambaMixer(transformers.MambaConfig(**sizes), 0), Mamba(32, d_state=8)
    theirs.load_state_dict(block.state_dict())
    u = random(2, 9, 32)
    torch.testing.assert_close(block(u), theirs(u))


def test_mamba2_block_with_packed_sequences():
    block = Mamba2(32, d_state=16, headdim=8, layer_idx=0)
    u, bounds = random(1, 12, 32), torch.tensor([0, 2, 12], dtype=torch.int32)
    alone = torch.cat([block(u[:, :2]), block(u[:, 2:])], 1)
    seq_idx = torch.tensor([[0] * 2 + [1] * 10], dtype=torch.int32)
    torch.testing.assert_close(block(u, seq_idx=seq_idx), alone)
    torch.testing.assert_close(block(u, cu_seqlens=bounds), alone)
    with torch.no_grad():
        memory, one, other = Remembered(), Remembered(), Remembered()
        block(u, cu_seqlens=bounds, inference_params=memory)
        block(u[:, :2], inference_params=one)
        block(u[:, 2:], inference_params=other)
        memory.seqlen_offset = one.seqlen_offset = other.seqlen_offset = 12
        nexts = random(2, 1, 32, seed=3)
        both = block(nexts, inference_params=memory)
        torch.testing.assert_close(both[:1], block(nexts[:1], inference_params=one))
        torch.testing.assert_close(both[1:], block(nexts[1:], inference_params=other))


def test_names_and_shapes_of_a_block_are_those_of_a_checkpoint():
    block = Mamba2(64, d_state=16, headdim=8, ngroups=2)
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 16, 64),
        "conv1d.weight": (128 + 2 * 2 * 16, 1, 4),
        "conv1d.bias": (128 + 2 * 2 * 16,),
        "dt_bias": (16,),
        "A_log": (16,),
        "D": (16,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    assert list(norms.GatedRMSNorm(8).state_dict()) == ["weight"]
    with pytest.raises(NotImplementedError, match="process_group"):
        Mamba2(64, process_group=object())


def test_last_tokens_of_packed_sequences():
    x, bounds = random(9, 3), torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    states = f.causal_conv1d_varlen_states(x, bounds, 4)
    expected = torch.zeros(3, 3, 4)
    expected[0, :, 2:] = x[:2].T
    expected[2] = x[5:].T
    assert torch.equal(states, expected)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_a_model_s_convolution_is_the_same_in_any_memory(activation):
    pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    x, weight, bias = random(2, 6, 9), random(6, 4, seed=1), random(6, seed=2)
    channel_last = x.transpose(1, 2).contiguous().transpose(1, 2)
    documents = torch.zeros(2, 9, dtype=torch.int32)
    expected = convolve(channel_last, weight, bias, None, activation)
    for same, numbers in ((x, None), (x, documents), (x[..., :1], None)):
        y = convolve(same, weight, bias, numbers, activation)
        torch.testing.assert_close(y, expected[..., : same.shape[2]])
    if activation != "gelu":
        plain = f.causal_conv1d_fn(x, weight, bias, activation=activation)
        torch.testing.assert_close(expected, plain)


def split_inputs(spare=0):
    zxbcdt = random(2, 9, spare + 2 * 8 + 2 * 3 + 2)  # d_inner 8, a group of 3, 2 heads
    weights = (random(14, 4, seed=1), random(14, seed=2), random(2, seed=3), -random(2).exp())
    return zxbcdt, *weights, random(2, seed=4)


def test_the_mixer_with_half_a_gated_unit():
    zxbcdt, *weights = split_inputs(spare=12)
    norm, projection = random(8, seed=5), random(7, 14, seed=6)
    options = {"chunk_size": 256, "rmsnorm_weight": norm, "headdim": 4}
    plain = f.mamba_split_conv1d_scan_combined(zxbcdt[..., 12:], *weights, **options)
    z0, x0 = zxbcdt[..., :6], zxbcdt[..., 6:12]
    expected = torch.cat([torch.nn.functional.silu(z0) * x0, plain], -1) @ projection.T
    options |= {"outproj_weight": projection, "return_final_states": True}
    y, states = f.mamba_split_conv1d_scan_combined(zxbcdt, *weights, **options)
    torch.testing.assert_close(y, expected)
    assert states.shape == (2, 2, 4, 3)


def test_padding_after_the_last_document_of_scan_and_mixer():
    documents = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2] * 2, dtype=torch.int32)
    zxbcdt, *weights = split_inputs()
    projection = {"outproj_weight": random(7, 8), "outproj_bias": random(7)}
    y = f.mamba_split_conv1d_scan_combined(zxbcdt, *weights, 256, seq_idx=documents, **projection)
    short = {"seq_idx": documents[:, :7], **projection}
    expected = f.mamba_split_conv1d_scan_combined(zxbcdt[:, :7], *weights, 256, **short)
    torch.testing.assert_close(y[:, :7], expected)
    assert not y[:, 7:].any()
    x, dt, A = random(2, 9, 2, 4), random(2, 9, 2, seed=1), -random(2).exp()
    B = random(2, 9, 1, 3, seed=2)
    y, states = f.mamba_chunk_scan_combined(
        *(x, dt, A, B, B, 256),
        seq_idx=documents,
        dt_softplus=True,
        return_final_states=True,
        state_dtype=torch.float64,
    )
    expected = ssd_scan(
        *(x[:, :7], dt[:, :7], A, B[:, :7], B[:, :7]), seq_idx=documents[:, :7], dt_softplus=True
    )
    torch.testing.assert_close(y[:, :7], expected)
    assert not y[:, 7:].any()
    assert states.dtype == torch.float64


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_layer_norm_with_a_gate(before, group_size):
    x, z, weight, bias = random(2, 3, 8), random(2, 3, 8, seed=1), random(8), random(8, seed=2)
    gate = torch.nn.functional.silu(z)
    v = x if before else x * gate
    groups = v.unflatten(-1, (-1, group_size or 8))
    normalised = groups - groups.mean(-1, keepdim=True)
    normalised = normalised / (normalised.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = normalised.flatten(-2) * weight + bias
    expected = expected * gate if before else expected
    options = {"group_size": group_size, "norm_before_gate": before}
    torch.testing.assert_close(norms.layernorm_fn(x, weight, bias, z, **options), expected)
    module = norms.GatedLayerNorm(8, 1e-6, **options)
    module.load_state_dict({"weight": weight, "bias": bias})
    torch.testing.assert_close(module(x, z), expected)
    rms = norms.layernorm_fn(x, weight, bias, z, is_rms_norm=True, **options)
    torch.testing.assert_close(rms, norms.rmsnorm_fn(x, weight, bias, z, **options))


def test_norm_of_a_sum():
    x, residual, weight = random(2, 8), random(2, 8, seed=1), random(8, seed=2)
    y, total = norms.rms_norm_fn(x, weight, None, residual, prenorm=True)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(total, (8,), weight, 1e-6))
    y, total = norms.layer_norm_fn(
        x.bfloat16(), weight, None, prenorm=True, residual_in_fp32=True, is_rms_norm=True
    )
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(NotImplementedError, match="rowscale: not offered"):
        norms.layer_norm_fn(x, weight, None, rowscale=random(2))


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_of_blocks(fused):
    """Two blocks, token by token, give what they give for the whole text."""

    def block(index):
        def mixer(dim):
            return Mamba2(dim, d_state=8, headdim=8, layer_idx=index)

        return blocks.Block(32, mixer, lambda dim: torch.nn.Linear(dim, dim), norms.RMSNorm, fused)

    torch.manual_seed(0)
    layers = [block(0), block(1)]

    def run(u, memory=None):
        residual = None
        for layer in layers:
            u, residual = layer(u, residual, inference_params=memory)
        return u + residual

    u = random(2, 9, 32)
    whole = run(u)
    whole.sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())
    with torch.no_grad():
        memory = blocks.InferenceParams(max_seqlen=9, max_batch_size=2)
        out = [run(u[:, :4], memory)]
        for t in range(4, 9):
            memory.seqlen_offset = t
            out.append(run(u[:, t : t + 1], memory))
    torch.testing.assert_close(torch.cat(out, 1), whole)
    memory.reset(9, 2)
    assert memory.seqlen_offset == 0
