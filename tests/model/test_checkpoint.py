"""Checkpoints: exact round trips, Hugging Face reads them, damaged ones are refused by name."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import corpus, entry, model, saved

from ysnake import evaluate, run, train
from ysnake.checkpoints import checkpoint
from ysnake.checkpoints.config_json import from_hugging_face, from_json, to_hugging_face
from ysnake.inference.generate import Context
from ysnake.inference.sampling import Sampling
from ysnake.model import Model
from ysnake.model.config import ModelConfig
from ysnake.shared.errors import InputError
from ysnake.text import tokenizer

SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "two groups, biases": {"n_groups": 2, "bias": True, "conv_bias": False},
    "dt_limit": {"dt_limit": (0.01, 0.05)},
    "a lower limit of dt": {"dt_limit": (0.05, math.inf)},
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


def test_special_tokens_have_the_names_that_the_configuration_gives(tmp_path):
    ours = json.loads((saved(tmp_path) / "tokenizer_config.json").read_text())
    assert {ours[f"{role}_token"] for role in ("bos", "eos", "pad")} == {tokenizer.EOT}
    learnt = tokenizer.train("bpe", [TEXT * 9], 300)
    learnt.add_special_tokens(["<s>", "</s>"])
    begin, end = (learnt.token_to_id(token) for token in ("<s>", "</s>"))
    m = model(vocab=learnt.get_vocab_size())
    m.use_config(replace(m.config, bos_id=begin, eos_id=end, pad_id=None))
    checkpoint.save(tmp_path / "other", m, learnt)
    written = json.loads((tmp_path / "other/tokenizer_config.json").read_text())
    assert (written["bos_token"], written["eos_token"]) == ("<s>", "</s>")
    assert "pad_token" not in written


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_transformers_reads_the_dtype_that_was_saved(tmp_path, dtype):
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[test]' has it")
    m = model().to(dtype)
    checkpoint.save(tmp_path / "model", m)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in m.state_dict().items():
        assert theirs[name].dtype == dtype
        assert torch.equal(theirs[name], weight)


def test_every_token_that_ends_a_text_is_kept(tmp_path):
    """Hugging Face's config.json may list several."""
    folder = saved(tmp_path)
    tokens = checkpoint.load_tokenizer(folder).get_vocab_size()

    def written():
        context = Context(checkpoint.load(folder), tokens)
        context.feed([5])
        return list(context.generate(Sampling(temperature=0), 4))

    first = written()[0]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, first]}))
    (folder / "manifest.json").unlink()
    assert written() == []
    checkpoint.save(tmp_path / "again", checkpoint.load(folder))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == [0, first]


def as_state_spaces(folder, kind="pickled", dtype=torch.float32, **changes):
    """Rewrite a saved folder as state-spaces would have published the model."""
    c = checkpoint.load_config(folder)
    weights = {k: t.to(dtype) for k, t in checkpoint.load(folder).state_dict().items()}
    weights["backbone.embedding.weight"] = weights.pop("backbone.embeddings.weight")
    layer = {"layer": "Mamba2", "d_state": c.d_state, "headdim": c.head_dim}
    for ours, theirs in {"n_groups": "ngroups", "bias": "bias", "conv_bias": "conv_bias"}.items():
        if getattr(c, ours) != getattr(ModelConfig, ours):
            layer[theirs] = getattr(c, ours)
    if c.dt_limit != (0.0, math.inf):
        layer["dt_limit"] = c.dt_limit
    content = {
        "d_model": c.d_model,
        "d_intermediate": 0,
        "n_layer": c.n_layers,
        "vocab_size": c.vocab_size - 3,
        "ssm_cfg": layer,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": c.tied,
    }
    (folder / "config.json").write_text(json.dumps(content | changes))
    for name in ("model.safetensors", "generation_config.json", "manifest.json"):
        (folder / name).unlink()
    if kind == "pickled":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        if c.tied:
            del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["pickled", "safetensors"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_state_spaces_names_and_back_are_exact(tmp_path, sizes, kind):
    folder = saved(tmp_path, **sizes)
    before = checkpoint.load(folder)
    after = checkpoint.load(as_state_spaces(folder, kind))
    assert after.config == before.config
    weights = before.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in after.state_dict().items())
    tied = after.lm_head.weight is after.backbone.embeddings.weight
    assert tied == sizes.get("tied", True)


def test_what_state_spaces_published_has_the_expected_sizes():
    content = {
        "d_model": 768,
        "d_intermediate": 0,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    config = from_json(content)
    with torch.device("meta"):
        assert Model(config).n_parameters() == 128_989_632
    assert (config.vocab_size, config.n_heads, config.eos_id) == (50288, 24, 0)


def test_a_state_spaces_folder_runs_trains_and_is_evaluated(tmp_path, capsys):
    folder = as_state_spaces(saved(tmp_path), dtype=torch.bfloat16)
    data = corpus(tmp_path)
    assert all(t.dtype == torch.float32 for t in checkpoint.load(folder).state_dict().values())
    for command, options in {
        run: ("--prompt", "The adder", "--max-tokens", "20", "--seed", "1"),
        evaluate: ("--data", str(data), "--max-documents", "2"),
    }.items():
        assert command.main([str(folder), *options]) == 0
        assert capsys.readouterr().out.strip()
    options = ("--max-steps", "2", "--seq-len", "16", "--batch-size", "2")
    source = ("--from", folder, "--data", data, "--run", tmp_path / "tuned")
    assert entry(train.main, *source, *options)[0] == 0
    assert "hidden_size" in json.loads((tmp_path / "tuned/last/config.json").read_text())


def test_weights_in_several_files(tmp_path):
    folder = saved(tmp_path)
    weights = checkpoint.load(folder).state_dict()
    everything = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(everything)
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({n: everything[n] for n in names if place[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    loaded = checkpoint.load(folder).state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.items())
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"{file}: no such file"):
        checkpoint.load(folder)


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
    (folder / "manifest.json").unlink()  # as in a checkpoint of somebody else's


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["backbone.layers.1.mixer.D"]
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()


def flip_bit(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-100] ^= 1
    (folder / name).write_bytes(content)


def pickled_code(folder):
    as_state_spaces(folder)
    torch.save({"backbone.norm_f.weight": Attack()}, folder / "pytorch_model.bin")


def hidden_layer(folder, **settings):
    as_state_spaces(folder, ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8} | settings)


class Attack:
    def __reduce__(self):
        return (print, ("code was run",))


DAMAGE = {
    "pytorch_model.bin: damaged": pickled_code,
    "expected layer Mamba2, got Mamba1": lambda f: as_state_spaces(f, ssm_cfg={}),
    "n_layer missing": lambda f: (f / "config.json").write_text(
        json.dumps({"ssm_cfg": {"layer": "Mamba2"}, "d_model": 1, "vocab_size": 1})
    ),
    "attn_layer_idx [1] is not supported": lambda f: as_state_spaces(f, attn_layer_idx=[1]),
    "D_has_hdim True is not supported": lambda f: hidden_layer(f, D_has_hdim=True),
    "ssm_cfg.d_stat is not supported": lambda f: hidden_layer(f, d_stat=8),
    "config.json: expected an object, got list": lambda f: (f / "config.json").write_text("[]"),
    "model.safetensors: no such file": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors: damaged or exchanged": lambda f: flip_bit(f, "model.safetensors"),
    "manifest.json: not JSON": lambda f: (f / "manifest.json").write_text("["),
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
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file; .*gpt-neox-20b"):
        checkpoint.load_tokenizer(folder)


def test_a_save_that_was_cut_short_leaves_the_old_checkpoint(tmp_path):
    folder = saved(tmp_path)
    (tmp_path / "model.new").mkdir()  # a save that was killed while it wrote
    (tmp_path / "model.new/config.json").write_text("{")
    checkpoint.load(folder)
    folder.rename(tmp_path / "model.old")  # or between its two renames
    checkpoint.load(folder)
    checkpoint.save(folder, model(vocab=300))
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"model", "model.old"}


def test_training_state_cannot_run_code(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(InputError, match=r"training_state\.pt: no such file"):
        checkpoint.load_training(folder)

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
    with pytest.raises(InputError, match=r"--checkpoint: .*last: not a run, so it has no best/"):
        checkpoint.resolve(tmp_path / "last", "best")
    assert checkpoint.resolve(tmp_path / "last").name == "last"
    with pytest.raises(InputError, match="no such checkpoint folder"):
        checkpoint.resolve(tmp_path / "nothing")
