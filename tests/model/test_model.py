"""The model: its two forms agree, documents stay apart, and sizes are what the presets say."""

import threading

import pytest
import torch
from small import model
from ysnake_kernels import backend
from ysnake_kernels.mixer import eager as mixer

from ysnake.model import LayerState, Model, initialise
from ysnake.model.config import PRESETS, ModelConfig, padded_vocab
from ysnake.shared.errors import InputError

SHAPES = {
    "one group": {},
    "two groups": {"n_groups": 2},
    "untied": {"tied": False},
    "factorised head": {"tied": False, "output_size": 16},
    "biases": {"bias": True, "conv_bias": False},
    "dt_limit": {"dt_limit": (0.01, 0.05)},
    "convolution 2, expand 1": {"conv_width": 2, "expand": 1},
}


def ids(batch=2, length=37, vocab=300):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def near(a, b, bound=1e-5):
    return (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_token_by_token_equals_whole_sequence(sizes):
    m, tokens = model(**sizes), ids()
    whole = m(tokens)
    state = None
    for t in range(tokens.shape[1]):
        logits, state = m.step(tokens[:, t], state)
        assert near(logits, whole[:, t])


@pytest.mark.parametrize("cuts", [(1, 36), (30, 1, 6), (2, 2, 33)])
def test_pieces_equal_whole_sequence(cuts):
    m, tokens = model(), ids()
    whole = m(tokens)
    state, out = None, []
    for piece in tokens.split(cuts, dim=1):
        logits, state = m.step(piece, state)
        out.append(logits)
    assert near(torch.cat(out, 1), whole)
    last, _ = m.step(tokens, None, last_only=True)
    assert near(last, whole[:, -1])


def test_eager_equals_reference():
    m, tokens = model(n_groups=2).double(), ids()
    with backend("reference"):
        expected = m(tokens)
    assert near(m(tokens), expected, 1e-10)


def test_state_has_the_same_size_after_any_length():
    m = model()
    sizes = set()
    for length in (1, 10, 1000):
        _, state = m.step(ids(1, length))
        sizes.add(tuple(t.shape for layer in state for t in (layer.conv, layer.ssm)))
    assert len(sizes) == 1


def test_packed_documents_equal_separate_ones():
    m, tokens = model(), ids(1, 30)
    seq_idx = torch.tensor([[0] * 11 + [1] * 19])
    packed = m(tokens, seq_idx)
    assert near(packed[:, :11], m(tokens[:, :11]))
    assert near(packed[:, 11:], m(tokens[:, 11:]))


@pytest.mark.parametrize("recompute", [False, True])
def test_training_reads_on_from_a_state(recompute):
    """Outputs are those of the whole text. Gradients do not flow into the window before."""
    m, tokens = model().double(), ids(2, 40)
    m.backbone.recompute = recompute
    state = m.empty_state(2)
    first = m(tokens[:, :25], None, list(state))  # as FSDP and DDP may hand it on
    between = [LayerState(layer.conv, layer.ssm) for layer in state]
    second = m(tokens[:, 25:], None, state)
    assert near(torch.cat([first, second], 1), m(tokens), 1e-10)
    assert not between[0].ssm.requires_grad
    assert not between[0].conv.requires_grad

    weight = m.backbone.layers[0].mixer.in_proj.weight
    (grad,) = torch.autograd.grad(second.square().sum(), weight)
    step, values = 1e-4 * grad / grad.norm(), []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step
            state = [LayerState(layer.conv, layer.ssm) for layer in between]
            values.append(m(tokens[:, 25:], None, state).square().sum())
    assert (values[0] - values[1]).item() == pytest.approx(2e-4 * grad.norm().item(), rel=1e-5)


def test_a_recomputed_block_does_not_go_through_its_mixer_again(monkeypatch):
    """Only what the mixer's gradient starts from is computed once more, and all of it is right."""
    m, ids = model(), torch.arange(20).view(2, 10)
    m.loss(ids, ids).backward()
    expected = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    passes = []
    forward = mixer._forward
    monkeypatch.setattr(mixer, "_forward", lambda *args: passes.append(1) or forward(*args))
    m.backbone.recompute = True
    m.loss(ids, ids).backward()
    assert len(passes) == len(m.backbone.layers)
    for parameter, grad in zip(m.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_in_another_thread_computes_again_as_forward_did(recompute):
    """On a GPU, torch runs backward in a thread that knows of no override."""
    m, ids = model(), torch.arange(20).view(2, 10)
    m.backbone.recompute = recompute
    with backend("reference"):
        loss = m.loss(ids, ids)
    errors = []

    def backward():
        try:
            loss.backward()
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors


def test_order_of_tokens_matters_without_positions():
    m, tokens = model(), ids(1, 8)
    swapped = tokens.clone()
    swapped[:, [2, 5]] = tokens[:, [5, 2]]
    assert not near(m(swapped)[:, -1], m(tokens)[:, -1], 1e-3)


def test_chunk_size_does_not_change_the_result():
    m, tokens = model().double(), ids()
    other = model(chunk_size=5).double()
    assert near(other(tokens), m(tokens), 1e-10)


def test_bfloat16_weights_keep_states_in_float32():
    m = model().bfloat16()
    logits, state = m.step(ids())
    assert logits.dtype == torch.bfloat16
    assert state[0].ssm.dtype == torch.float32
    assert near(logits.float(), model()(ids()), 0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name):
    preset = PRESETS[name]
    sizes = {k: v for k, v in preset.settings.items() if k in ModelConfig.__annotations__}
    with torch.device("meta"):
        m = Model(ModelConfig(vocab_size=padded_vocab(preset.max_vocab), **sizes))
    expected, within = {
        "quick": (3e6, 0.15),
        "ys-24m": (24e6, 0.01),
        "ys-60m": (60e6, 0.02),
        "ys-71m": (71.3e6, 0.01),
    }[name]
    assert abs(m.n_parameters() - expected) <= within * expected


def test_initialisation():
    hippo = model().backbone.layers[0].mixer
    assert torch.allclose(hippo.A_log.exp(), torch.arange(1, 9).float())
    uniform = Model(model().config, init="uniform").backbone.layers[0].mixer
    assert uniform.A_log.exp().min() >= 1
    assert uniform.A_log.exp().max() <= 16
    assert not hippo.out_proj.weight.eq(0).all()
    closed = Model(model().config, zero_out=True)
    assert all(layer.mixer.out_proj.weight.eq(0).all() for layer in closed.backbone.layers)
    dt = torch.nn.functional.softplus(hippo.dt_bias)
    assert dt.min() >= 0.000999
    assert dt.max() <= 0.1001
    with pytest.raises(ValueError, match="init: expected 'hippo' or 'uniform', got 'random'"):
        initialise(model(), "random")


def test_state_can_be_copied_for_a_branch():
    m, tokens = model(), ids(1, 12)
    _, state = m.step(tokens[:, :6])
    branch = [LayerState(layer.conv.clone(), layer.ssm.clone()) for layer in state]
    for t in range(6, 9):
        m.step(tokens[:, t], state)
    logits, _ = m.step(tokens[:, 6:], branch)
    assert near(logits, m(tokens)[:, 6:])


BAD = {
    "head_dim: expected a divisor of expand * d_model = 64, got 48": {"head_dim": 48},
    "n_groups: expected a divisor of the 8 heads, got 3": {"n_groups": 3},
    "d_state: expected at least 1, got 0": {"d_state": 0},
    "n_layers: expected at least 1, got -1": {"n_layers": -1},
    "conv_width: expected at least 2, got 1": {"conv_width": 1},
    "chunk_size: expected at least 1, got 0": {"chunk_size": 0},
    "output_size: a factorised head cannot be tied": {"output_size": 16},
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_sizes_are_named(message):
    with pytest.raises(InputError) as error:
        model(**BAD[message])
    assert message in str(error.value)
