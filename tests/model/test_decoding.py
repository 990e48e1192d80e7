"""Writing token by token equals the model's own steps, and with smaller weights it stays near."""

import platform
import subprocess
import sys

import pytest
import torch
from small import entry, environment, model, saved
from torch.nn.functional import cross_entropy
from ysnake_kernels.linear_step import MAC_ENGINE
from ysnake_kernels.native import build
from ysnake_kernels.native.matrix import FORMATS

from ysnake import evaluate, run
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context
from ysnake.inference.model_options import make_decoder
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


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "COMPILERS", ["no-such-compiler"])
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("compile", [True, False])
def test_steps_equal_the_models_own(sizes, batch, compile):
    plain, tokens = model(**sizes), ids(batch, 9)
    expected, _ = plain.step(tokens)
    decoder, state = Decoder(model(**sizes), compile=compile), None
    for i in range(tokens.shape[1]):
        logits, state = decoder.step(tokens[:, i], state)
        assert torch.allclose(logits, expected[:, i], atol=1e-5)
    # a piece of one token, and pieces of many, go on from the same state
    logits, state = decoder.step(tokens[:, :1], state)
    more, again = plain.step(torch.cat([tokens, tokens[:, :1]], 1))
    assert torch.allclose(logits[:, 0], more[:, -1], atol=1e-5)
    logits, _ = decoder.step(tokens, state, last_only=True)
    assert torch.allclose(logits, plain.step(tokens, again)[0][:, -1], atol=1e-5)


@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS)
def test_the_step_for_a_gpu_equals_the_models_own(sizes):
    plain, tokens = model(**sizes).eval(), ids(3, 6)
    expected, _ = plain.step(tokens)
    step, state = ReplayedStep(plain), plain.empty_state(3)
    with torch.no_grad():
        for i in range(tokens.shape[1]):
            assert torch.allclose(step.write(tokens[:, i], state), expected[:, i], atol=1e-5)


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


def narrower(layer, name):
    state = getattr(layer, name)
    setattr(layer, name, state[:, :-1])


def strided(layer, name):
    state = getattr(layer, name)
    setattr(layer, name, state.mT.contiguous().mT)


def rounded(layer, name):
    setattr(layer, name, getattr(layer, name).bfloat16())


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (narrower, "conv", r"conv_state: expected shape \(2, 80, 3\) to match h, got \(2, 79, 3\)"),
        (narrower, "ssm", r"ssm_state: expected shape \(2, 8, 8, 8\) to match h, got"),
        (rounded, "conv", "conv_state: expected one of float32, got torch.bfloat16"),
        (rounded, "ssm", "ssm_state: expected one of float32, got torch.bfloat16"),
        (strided, "ssm", "ssm_state: expected a contiguous tensor, got a strided one"),
    ],
)
def test_compiled_code_refuses_a_state_that_does_not_fit(change, name, message):
    decoder = Decoder(model())
    if decoder.native is None:
        pytest.skip("no C++ compiler")
    state = decoder.model.empty_state(2)
    change(state[1], name)
    with pytest.raises((ValueError, TypeError), match=message):
        decoder.step(ids(2), state)
    with pytest.raises(ValueError, match="states: expected those of 2 layers, got 1"):
        decoder.step(ids(2), state[:1])
    with pytest.raises(ValueError, match=r"conv_state: expected shape \(3, 80, 3\) to match h"):
        decoder.step(ids(3), decoder.model.empty_state(2))


def test_without_a_compiler_pure_torch_writes(no_compiler):
    decoder = Decoder(model(), "auto")
    assert decoder.native is None
    assert decoder.weights == "float32"
    assert Decoder(model(), "int8").weights == "int8"
    for weights in ("bfloat16", "int4"):
        with pytest.raises(InputError, match=f"--weights: {weights} needs .*no C.. compiler"):
            Decoder(model(), weights)


@pytest.mark.skipif(
    MAC_ENGINE not in torch.backends.quantized.supported_engines, reason="torch is built without it"
)
def test_int8_with_the_engine_of_a_mac(no_compiler, monkeypatch, recwarn):
    monkeypatch.setattr(torch.backends.quantized, "engine", MAC_ENGINE)
    exact, tokens = Decoder(model()), torch.tensor([[5], [6]])
    expected, _ = exact.step(tokens)
    logits, _ = Decoder(model(), "int8").step(tokens)
    assert 0 < (logits - expected).abs().max() / expected.abs().max() < NEAR["int8"]
    assert not recwarn


def test_a_compiler_that_fails_is_named(no_compiler, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "false")
    decoder = make_decoder(model(), "auto")
    assert decoder.native is None
    assert decoder.weights == "float32"
    said = capsys.readouterr().err
    assert "warning: false failed: no message; generating with pure torch, which is " in said


def test_a_compiler_that_works_gives_smaller_weights():
    decoder = Decoder(model(), "auto")
    if decoder.native is None:
        pytest.skip("no C++ compiler")
    assert decoder.weights == "bfloat16"


RESIDENT = """
import re
from ysnake_kernels.allocator import give_back_freed_memory
from ysnake.inference.model_options import make_decoder
from ysnake.model.config import ModelConfig
from ysnake.model.network import Model
from ysnake.shared import cli

def resident():
    return int(re.search("RssAnon:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])

cli.tune_memory()
model = Model(ModelConfig(512, d_model=512, n_layers=8))
give_back_freed_memory()
before = resident()
make_decoder(model, "int8", False)
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="frees memory as glibc does")
def test_fewer_bits_take_less_memory():
    command = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    freed = 8 * 512 * (2 * 1024 + 2 * 128 + 16 + 1024) * 3 / 1024  # kilobytes of eight layers
    assert int(done.stdout) > 0.9 * freed


def test_the_weights_stay_what_they_were():
    before, after = model(), model()
    Decoder(after)
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    tokens = ids(2, 20)
    assert torch.allclose(before(tokens), after(tokens), atol=1e-5)


# format -> relative error of the logits of an untrained model, whose errors do not average out
NEAR = {"bfloat16": 0.02, "int8": 0.06, "int4": 0.4}


@pytest.mark.parametrize("sizes", [FORMS["plain"], FORMS["biases"], FORMS["factorised head"]])
@pytest.mark.parametrize(("weights", "compile"), [*((w, True) for w in NEAR), ("int8", False)])
def test_smaller_weights_are_near(sizes, weights, compile):
    tokens = ids(4, 33)
    exact, _ = model(**sizes).step(tokens)
    decoder = Decoder(model(**sizes), weights, compile)
    whole, _ = decoder.step(tokens)
    state, each = None, []
    for i in range(tokens.shape[1]):
        logits, state = decoder.step(tokens[:, i], state)
        each.append(logits)
    each = torch.stack(each, 1)
    for got in (whole, each):
        assert torch.linalg.norm(got - exact) < NEAR[weights] * torch.linalg.norm(exact)
    rows = cross_entropy(exact.flatten(0, 1), exact.argmax(-1).flatten())
    assert cross_entropy(each.flatten(0, 1), exact.argmax(-1).flatten()) < 1.02 * rows


def test_a_saved_state_goes_on_with_other_weights(tmp_path):
    before = Context(Decoder(model(), "int8"), 300)
    before.feed([1, 2, 3])
    before.save(tmp_path / "state")
    for weights in FORMATS:
        context = Context(Decoder(model(), weights), 300)
        context.load(tmp_path / "state")
        assert torch.equal(context.next_logits(), before.next_logits())


@pytest.mark.parametrize("compile", [True, False])
def test_a_row_of_int8_does_not_depend_on_its_neighbours(compile):
    decoder = Decoder(model(), "int8", compile)
    linear, x = decoder.model.lm_head, torch.randn(3, 32)
    scaled = torch.cat([x[:1], 1000 * x[1:]])
    assert torch.allclose(linear(scaled)[0], linear(x)[0], atol=1e-6)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_text_read_at_once_and_in_pieces_is_the_same(weights):
    """Up to 128 tokens are multiplied by one way, and more by another."""
    decoder, tokens = Decoder(model(), weights), torch.randint(1, 300, (1, 300))
    whole, _ = decoder.step(tokens)
    state, logits = None, None
    for part in tokens.split(100, 1):
        logits, state = decoder.step(part, state)
    torch.testing.assert_close(logits[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_where_smaller_weights_cannot_be():
    for weights in ("int8", "int4"):
        with pytest.raises(
            InputError,
            match=f"{weights} is for float32 models on a CPU, and this one is in float64 on cpu",
        ):
            Decoder(model().double(), weights)
    with pytest.raises(InputError, match=r"--weights: expected one of auto, float32, .*, got int2"):
        Decoder(model(), "int2")


def test_the_commands_take_smaller_weights(tmp_path):
    folder = saved(tmp_path)
    losses = []
    code, out, errors = entry(run.main, folder, "--prompt", "The viper", "--weights", "int4")
    assert code == 0, errors
    for weights in FORMATS:
        options = ["--data", tmp_path / "snakes.txt", "--weights", weights]
        code, out, errors = entry(evaluate.main, folder, *options)
        assert code == 0, errors
        losses.append(float(out.split(": ")[1].split()[0]))
    for loss, bound in zip(losses, (0, 0.005, 0.005, 0.03), strict=True):
        assert abs(loss / losses[0] - 1) <= bound
