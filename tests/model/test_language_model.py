"""`ysnake.load`: completing, scoring and logits from Python."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from small import python, saved

import ysnake
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("loaded"))


@pytest.fixture(scope="module")
def model(folder):
    return ysnake.load(folder)


def test_generate_is_what_the_command_writes(folder, model, tmp_path):
    options = ["--temperature", "0", "--max-tokens", "9"]
    done = python("ysnake.run", folder, "--prompt", "The adder", *options, cwd=tmp_path)
    text = model.generate("The adder", 9, temperature=0)
    assert done.stdout == escape_controls(text, keep="\n\t") + "\n"
    assert "".join(model.generate("The adder", 9, temperature=0, stream=True)) == text
    assert model.generate("The adder", 9, temperature=0, stop=[text[3:5]]) == text[:3]
    assert model.generate("The adder", 9, temperature=0, stop=text[3:5]) == text[:3]


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_autocast_around_it_changes_nothing(folder, weights):
    loaded = ysnake.load(folder, weights=weights)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            text = loaded.generate("The adder", 30, temperature=0)
            found.append((text, loaded.loss("The boa sleeps."), loaded.logits("The boa").tolist()))
    assert found[0] == found[1]


def test_a_model_without_a_first_token_is_refused(folder):
    loaded = ysnake.load(folder)
    m = loaded.decoder.model
    m.use_config(replace(m.config, bos_id=None))
    for ask in (loaded.logits, loaded.loss):
        with pytest.raises(InputError, match="bos_id: expected a token"):
            ask("The boa")


def test_loss_follows_from_the_logits(model):
    text = "The boa sleeps."
    ids = torch.tensor([*model.tokenizer.encode(text).ids, model.decoder.model.config.eos_id])
    logits = model.logits(text)
    assert logits.shape == (len(ids), model.tokenizer.get_vocab_size())
    full, _ = model.decoder.step(torch.tensor([[model.decoder.model.config.bos_id, *ids[:-1]]]))
    expected = torch.nn.functional.cross_entropy(full[0], ids)
    assert model.loss(text) == pytest.approx(expected.item(), rel=1e-5)


def test_it_shows_its_sizes(model):
    size = model.tokenizer.get_vocab_size()
    assert repr(model) == f"<LanguageModel d_model=32, n_layers=2, vocabulary of {size}>"


def test_wrong_arguments(model, tmp_path):
    with pytest.raises(InputError, match="max_tokens"):
        model.generate("a", 0)
    with pytest.raises(InputError, match="temperature"):
        model.generate("a", temperature=-1)
    with pytest.raises(TypeError, match="no argument max_token; expected prompt, max_tokens, stop"):
        model.generate("a", max_token=1)
    with pytest.raises(InputError, match="stop: expected texts of at least one character"):
        model.generate("a", stop="")
    for wrong in ({"max_tokens": "5"}, {"max_tokens": 2.5}, {"temperature": "hot"}, {"stop": [3]}):
        with pytest.raises(InputError, match=f"{min(wrong)}: expected .*, got "):
            model.generate("a", **wrong)
    for call in (model.logits, model.loss, model.generate):
        with pytest.raises(InputError, match="expected text, got 3"):
            call(3)
    with pytest.raises(InputError, match="nowhere"):
        ysnake.load(tmp_path / "nowhere")


def test_importing_it_does_not_import_torch():
    code = "import sys, ysnake; ysnake.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
