"""Checkpoints: exact round trips, Hugging Face reads them, damaged ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import model, saved

from ysnake import checkpoint, tokenizer
from ysnake.config import InputError, from_hugging_face, to_hugging_face

SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "two groups, biases": {"n_groups": 2, "bias": True, "conv_bias": False},
    "dt_limit": {"dt_limit": (0.01, 0.05)},
}
TEXT = "The cobra number 4 sleeps. 蛇は眠る 🐍\t(and\n  wakes)"


def ids(vocab=300):
    return torch.randint(vocab, (2, 33), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_round_trip_is_exact(tmp_path, sizes):
    folder = saved(tmp_path, **sizes)
    loaded = checkpoint.load(folder)
    again = tmp_path / "again"
    checkpoint.save(again, loaded, checkpoint.load_tokenizer(folder))
    for name in [p.name for p in folder.iterdir()]:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_factorised_head_is_saved_as_its_product(tmp_path):
    m = model(tied=False, output_size=16)
    checkpoint.save(tmp_path / "m", m)
    loaded = checkpoint.load(tmp_path / "m")
    assert loaded.lm_head.weight.shape == (320, 32)
    torch.testing.assert_close(loaded(ids()), m(ids()))
    assert json.loads((tmp_path / "m/config.json").read_text())["tie_word_embeddings"] is False
    whole = checkpoint.with_factors(loaded, checkpoint.head_factors(m), 16)
    assert torch.equal(whole(ids()), m(ids()))


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_transformers_gives_the_same_logits(tmp_path, sizes):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    folder = saved(tmp_path, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = checkpoint.load(folder)
    with torch.no_grad():
        expected = theirs(ids()).logits
        far = (ours(ids()) - expected).norm() / expected.norm()
    assert far <= 1e-4
    theirs.save_pretrained(tmp_path / "back")
    back = checkpoint.load(tmp_path / "back")
    weights = ours.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in back.state_dict().items())


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_transformers_gives_the_same_ids_and_never_samples_padding(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    learnt = tokenizer.train(kind, [TEXT * 3], 280)
    size = learnt.get_vocab_size()
    checkpoint.save(tmp_path / "m", model(vocab=size), learnt)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (TEXT, "letters <|endoftext|> in a text", "", "  "):
        assert theirs(text).input_ids == tokenizer.encode(learnt, text)
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == 0
    their_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    out = their_model.generate(
        torch.zeros(1, 1, dtype=torch.long), do_sample=True, max_new_tokens=300, top_k=0
    )
    assert out.max() < size < model(vocab=size).config.vocab_size


def test_every_field_is_written(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    folder = saved(tmp_path, dt_limit=(0.01, 0.05))
    written = json.loads((folder / "config.json").read_text())
    own = set(transformers.Mamba2Config.__annotations__) - {"model_type"}
    assert own <= set(written)
    assert "time_step_limit" not in to_hugging_face(model().config)


def test_what_a_config_leaves_out_is_hugging_faces_default():
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 8}
    config = from_hugging_face({"model_type": "mamba2", "head_dim": 8, **sizes})
    assert (config.n_groups, config.tied) == (8, False)
    assert (config.bos_id, config.pad_id, config.eos_id) == (0, 1, 2)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.layers.1.mixer.D"]
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()


def flip_bit(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-100] ^= 1
    (folder / name).write_bytes(content)


DAMAGE = {
    "model.safetensors: no such file": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors: damaged or exchanged": lambda f: flip_bit(f, "model.safetensors"),
    "manifest.json: damaged": lambda f: (f / "manifest.json").write_text("["),
    "backbone.layers.1.mixer.D is missing": drop_weight,
    "config.json: no such file": lambda f: (f / "config.json").unlink(),
    "config.json: not JSON": lambda f: (f / "config.json").write_text("{"),
    "expected model_type mamba2, got llama": lambda f: edit_config(f, model_type="llama"),
    "config.json asks for (320, 64)": lambda f: edit_config(f, hidden_size=64, num_heads=16),
    "num_heads 9 is not expand * hidden_size": lambda f: edit_config(f, num_heads=9),
    "backbone.layers.1.mixer.A_log does not belong": lambda f: edit_config(f, num_hidden_layers=1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(tmp_path, message):
    folder = saved(tmp_path)
    DAMAGE[message](folder)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    folder = saved(tmp_path)
    other = tokenizer.train("bpe", ["quite other words, and more of them " * 9], 300)
    tokenizer.save(other, folder)
    with pytest.raises(InputError, match=r"tokenizer\.json: damaged or exchanged"):
        checkpoint.load_tokenizer(folder)
    (folder / "manifest.json").unlink()  # as in a checkpoint that transformers wrote
    small = tokenizer.train("word", ["few words"], 20)
    tokenizer.save(small, folder)
    with pytest.raises(InputError, match="do not fit a model with 320 rows"):
        checkpoint.load_tokenizer(folder)


def test_a_save_that_was_cut_short_leaves_the_old_checkpoint(tmp_path):
    folder = saved(tmp_path)
    (tmp_path / "model.new").mkdir()  # a save that was killed while it wrote
    (tmp_path / "model.new/config.json").write_text("{")
    checkpoint.load(folder)
    folder.rename(tmp_path / "model.old")  # or between its two renames
    checkpoint.load(folder)
    checkpoint.save(folder, model(vocab=300))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["model"]


def test_training_state_cannot_run_code(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(InputError, match=r"training_state\.pt: no such file"):
        checkpoint.load_training(folder)

    class Attack:
        def __reduce__(self):
            return (print, ("code was run",))

    torch.save({"x": Attack()}, folder / "training_state.pt")  # the manifest does not know it
    with pytest.raises(InputError, match=r"training_state\.pt: damaged"):
        checkpoint.load_training(folder)


def test_resolve_finds_the_checkpoint_of_a_run(tmp_path):
    for name in ("best", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for ended, expected in {"loss": "last", "patience": "best", None: "last"}.items():
        (tmp_path / "last/progress.json").write_text(json.dumps({"ended": ended}))
        assert checkpoint.resolve(tmp_path).name == expected
    assert checkpoint.resolve(tmp_path, "best").name == "best"
    assert checkpoint.resolve(tmp_path / "last").name == "last"
    with pytest.raises(InputError, match="no such checkpoint folder"):
        checkpoint.resolve(tmp_path / "nothing")
