"""The decoder for the CPU equals the model's own steps; int8 stays near it."""

import pytest
import torch
from small import model, python, saved
from torch.nn.functional import cross_entropy

from ysnake.config import InputError
from ysnake.decoding import Decoder

FORMS = {
    "plain": {},
    "two groups": {"n_groups": 2},
    "no biases": {"conv_bias": False},
    "biases": {"bias": True},
    "steps limited": {"dt_limit": (0.01, 0.05)},
    "factorised head": {"tied": False, "output_size": 16},
    "untied": {"tied": False},
}


def ids(*shape):
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_steps_equal_the_models_own(sizes, batch):
    plain, tokens = model(**sizes), ids(batch, 9)
    expected, _ = plain.step(tokens)
    decoder, state = Decoder(model(**sizes)), None
    for i in range(tokens.shape[1]):
        logits, state = decoder.step(tokens[:, i], state)
        assert torch.allclose(logits, expected[:, i], atol=2e-6)
    # a piece of one token, and pieces of many, go on from the same state
    logits, state = decoder.step(tokens[:, :1], state)
    more, again = plain.step(torch.cat([tokens, tokens[:, :1]], 1))
    assert torch.allclose(logits[:, 0], more[:, -1], atol=2e-6)
    logits, _ = decoder.step(tokens, state, last_only=True)
    assert torch.allclose(logits, plain.step(tokens, again)[0][:, -1], atol=2e-6)


def test_rows_of_a_larger_state_are_written_in_place():
    decoder, tokens = Decoder(model()), ids(2)
    state = decoder.model.empty_state(5)
    rows = [type(layer)(layer.conv[:2], layer.ssm[:2]) for layer in state]
    decoder.step(tokens, rows)
    _, alone = decoder.step(tokens)
    for layer, own in zip(state, alone, strict=True):
        assert torch.equal(layer.ssm[:2], own.ssm)
        assert torch.equal(layer.conv[:2], own.conv)
        assert not layer.ssm[2:].any()


def test_the_weights_stay_what_they_were():
    before, after = model(), model()
    Decoder(after)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokens = ids(2, 20)
    assert torch.allclose(before(tokens), after(tokens), atol=2e-6)


@pytest.mark.parametrize("sizes", [FORMS["plain"], FORMS["biases"], FORMS["factorised head"]])
def test_int8_is_near(sizes):
    tokens = ids(4, 33)
    exact, _ = model(**sizes).step(tokens)
    decoder = Decoder(model(**sizes), "int8")
    whole, _ = decoder.step(tokens)
    state, each = None, []
    for i in range(tokens.shape[1]):
        logits, state = decoder.step(tokens[:, i], state)
        each.append(logits)
    each = torch.stack(each, 1)
    for got in (whole, each):
        assert torch.linalg.norm(got - exact) < 0.06 * torch.linalg.norm(exact)
    rows = cross_entropy(exact.flatten(0, 1), exact.argmax(-1).flatten())
    assert cross_entropy(each.flatten(0, 1), exact.argmax(-1).flatten()) < 1.005 * rows


def test_a_row_of_int8_does_not_depend_on_its_neighbours():
    decoder = Decoder(model(), "int8")
    linear, x = decoder.model.lm_head, torch.randn(3, 32)
    scaled = torch.cat([x[:1], 1000 * x[1:]])
    assert torch.allclose(linear(scaled)[0], linear(x)[0], atol=1e-6)


def test_where_int8_cannot_be():
    with pytest.raises(InputError, match="--weights: int8 is for float32 models on a CPU"):
        Decoder(model().double(), "int8")
    with pytest.raises(InputError, match="--weights: expected float32 or int8, got int4"):
        Decoder(model(), "int4")


def test_the_commands_take_int8(tmp_path):
    folder = saved(tmp_path)
    done = python("ysnake.run", folder, "--prompt", "The viper", "--weights", "int8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = []
    for weights in ("float32", "int8"):
        options = ["--data", tmp_path / "snakes.txt", "--weights", weights]
        done = python("ysnake.evaluate", folder, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(float(done.stdout.split(": ")[1].split()[0]))
    assert abs(losses[1] / losses[0] - 1) < 0.005
