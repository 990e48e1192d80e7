"""The decoder for the CPU equals the model's own steps; int8 stays near it."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from small import entry, model, saved
from torch.nn.functional import cross_entropy

from ysnake import evaluate, run
from ysnake.inference.decoding import WEIGHTS, Decoder
from ysnake.inference.replay import ReplayedStep
from ysnake.shared.errors import InputError

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


@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS)
def test_the_step_for_a_gpu_equals_the_models_own(sizes):
    plain, tokens = model(**sizes).eval(), ids(3, 6)
    expected, _ = plain.step(tokens)
    step, state = ReplayedStep(plain), plain.empty_state(3)
    with torch.no_grad():
        for i in range(tokens.shape[1]):
            assert torch.allclose(step.write(tokens[:, i], state), expected[:, i], atol=2e-6)


COMPILER = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
HEADERS = Path(sysconfig.get_path("include"), "Python.h")
LIMITED = FORMS["two groups"] | FORMS["biases"] | FORMS["steps limited"]


@pytest.mark.skipif(not (COMPILER and HEADERS.exists()), reason="needs a C++ compiler and Python.h")
@pytest.mark.parametrize(
    ("weights", "sizes", "batches"),
    [
        ("float32", LIMITED | {"n_layers": 1}, (1,)),
        *(
            pytest.param(weights, sizes, (1, 2, 5, 40), marks=pytest.mark.slow)
            for weights in WEIGHTS
            for sizes in FORMS.values()
        ),
    ],
)
def test_compiled_steps_equal_those_that_are_not(weights, sizes, batches):
    torch.compiler.reset()
    plain, compiled = (Decoder(model(**sizes), weights, c) for c in (False, True))
    for batch in batches:
        tokens = ids(batch, 4)
        expected, state = plain.step(tokens[:, :2], last_only=True)
        logits, own = compiled.step(tokens[:, :2], last_only=True)
        for i in (2, 3):
            expected, state = plain.step(tokens[:, i], state)
            logits, own = compiled.step(tokens[:, i], own)
            assert torch.allclose(logits, expected, atol=2e-6)
        for a, b in zip(state, own, strict=True):
            assert torch.allclose(a.conv, b.conv, atol=2e-6)
            assert torch.allclose(a.ssm, b.ssm, atol=2e-6)


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


def test_compiling_where_it_cannot_be_says_so(tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "none")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"--compile: expected a C[+][+] compiler that works: "):
        Decoder(model(n_layers=1), compile=True)
    with pytest.raises(InputError, match="--compile: is for float32 models on a CPU"):
        Decoder(model().double(), compile=True)


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
    assert entry(run.main, folder, "--prompt", "The viper", "--weights", "int8")[0] == 0
    losses = []
    for weights in ("float32", "int8"):
        options = ["--data", tmp_path / "snakes.txt", "--weights", weights]
        code, out, errors = entry(evaluate.main, folder, *options)
        assert code == 0, errors
        losses.append(float(out.split(": ")[1].split()[0]))
    assert abs(losses[1] / losses[0] - 1) < 0.005
