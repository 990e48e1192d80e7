"""Folders made to attack: nothing runs, nothing is written outside, and each is refused at once."""

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from small import TINY, corpus, saved

from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.training import new_run, settings
from ysnake.training import run as training_run
from ysnake.training.memory import peak
from ysnake.training.parallel import Ranks
from ysnake.training.resume import resume as resume_run

REFUSED_WITHIN = 1.0  # seconds of this process; it takes a few hundredths
MEMORY = 300_000_000  # bytes that a refusal may need


class Attack:
    """Leaves a file behind when it is unpickled by what trusts it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def pickled(folder, content, **options):
    """The folder with pytorch_model.bin in the place of its weights."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin", **options)


def plain_pickle(folder, marker):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(marker)))


def zip_bomb(folder, marker):
    """The zip file that torch writes, with the weights as compressed zeros."""
    pickled(folder, dict(checkpoint.load(folder).state_dict()))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(1 << 25) if name.endswith("data/0") else content)


def index(folder, *names):
    (folder / "model.safetensors").rename(folder.with_name("outside.safetensors"))
    content = {"weight_map": {f"weight{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def safetensors(folder, header, size, length=None):
    """A file of `size` bytes, most of them a hole, with a header that claims a length."""
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    os.truncate(path, size)


def many_weights(count):
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    return b"{" + b"".join(entry % i for i in range(count))[:-1] + b"}"


def huge_weight(folder, marker):
    """A hole of 100 GB, rightly described."""
    shape = {"dtype": "F32", "shape": [25_000_000_000], "data_offsets": [0, 100_000_000_000]}
    header = json.dumps({"backbone.embeddings.weight": shape}).encode()
    safetensors(folder, header, 8 + len(header) + 100_000_000_000)


def config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def repeated(folder, shape):
    """A weight whose elements are all the same one in memory."""
    weights = dict(checkpoint.load(folder).state_dict())
    weights["backbone.norm_f.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(*shape)
    pickled(folder, weights)


def link(folder, name, target):
    if os.name == "nt":
        pytest.skip("links need rights there")
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def fifo(folder, name):
    if os.name == "nt":
        pytest.skip("Windows has no such files")
    (folder / name).unlink()
    os.mkfifo(folder / name)


WEIGHTS = {
    "pickle payload": (lambda f, m: pickled(f, Attack(m)), "pytorch_model.bin: damaged"),
    "pickle payload among weights": (
        lambda f, m: pickled(f, {"backbone.norm_f.weight": Attack(m)}),
        "pytorch_model.bin: damaged",
    ),
    "pickle payload, torch's old format": (
        lambda f, m: pickled(f, Attack(m), _use_new_zipfile_serialization=False),
        "pytorch_model.bin: damaged",
    ),
    "pickle payload, no torch": (plain_pickle, "pytorch_model.bin: damaged"),
    "zip bomb": (zip_bomb, "pytorch_model.bin: damaged (content of"),
    "one number as a terabyte": (
        lambda f, m: repeated(f, (10**12,)),
        "pytorch_model.bin: damaged (tensors of",
    ),
    "index leaves the folder": (
        lambda f, m: index(f, "../outside.safetensors"),
        "index.json: expected names of files beside it, got ../outside.safetensors",
    ),
    "index with an absolute path": (
        lambda f, m: index(f, str(f.with_name("outside.safetensors"))),
        "index.json: expected names of files beside it, got /",
    ),
    "index of the folder": (lambda f, m: index(f, ""), "index.json: expected names of files"),
    "index of the folder above": (lambda f, m: index(f, ".."), "index.json: expected names of"),
    "index of numbers": (lambda f, m: index(f, 5), "index.json: damaged"),
    "header longer than any file": (
        lambda f, m: safetensors(f, b"{}", 100, length=2**63),
        "model.safetensors: damaged (a list of weights of 9,223,372,036,854,775,808 bytes)",
    ),
    "header of a billion entries": (
        lambda f, m: safetensors(f, b"{", 60_000_000_000, length=59_999_999_000),
        "model.safetensors: damaged (a list of weights of 59,999,999,000 bytes)",
    ),
    "header of very many entries": (
        lambda f, m: safetensors(f, many_weights(70_000), 8 + len(many_weights(70_000))),
        "model.safetensors: ",
    ),
    "header nested deep": (
        lambda f, m: safetensors(f, b"[" * 100_000, 100_008),
        "model.safetensors: damaged",
    ),
    "weight of 100 GB": (huge_weight, "model.safetensors: "),
    "weights are a pipe": (lambda f, m: fifo(f, "model.safetensors"), "no such file"),
    "weights are a link to a device": (
        lambda f, m: link(f, "model.safetensors", "/dev/zero"),
        "model.safetensors: no such file",
    ),
    **{
        f"{name} of {value:.0e}": (lambda f, m, c={name: value}: config(f, **c), "config.json")
        for name in ("hidden_size", "num_hidden_layers", "state_size", "vocab_size", "n_groups")
        for value in (10**6, 10**12)
    },
    "conv_kernel of 1e+12": (
        lambda f, m: config(f, conv_kernel=10**12),
        "config.json asks for (80, 1, 1000000000000)",
    ),
    "expand of 1e+300": (lambda f, m: config(f, expand=10**300), "more than a petabyte"),
    "very many layers, pickled": (
        lambda f, m: [
            pickled(f, dict(checkpoint.load(f).state_dict())),
            config(f, num_hidden_layers=9999),
        ],
        "too few for the 9999 layers that config.json asks for",
    ),
    "config nested deep": (
        lambda f, m: (f / "config.json").write_text("[" * 1_000_000),
        "config.json: not JSON",
    ),
    "config with a number of a million digits": (
        lambda f, m: (f / "config.json").write_text('{"hidden_size": ' + "9" * 1_000_000 + "}"),
        "config.json: not JSON",
    ),
    "config of 10 GB": (
        lambda f, m: os.truncate(f / "config.json", 10**10),
        "config.json: expected at most",
    ),
    "config is a link to a device": (
        lambda f, m: link(f, "config.json", "/dev/zero"),
        "config.json: no such file",
    ),
    "manifest nested deep": (
        lambda f, m: (f / "manifest.json").write_text("[" * 1_000_000),
        "manifest.json: not JSON",
    ),
}


def edit_tokenizer(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_vocab(folder, **entries):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= entries
    path.write_text(json.dumps(content))


def nested(depth):
    inner = {"type": "Lowercase"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner


def sequence(parts):
    return {"type": "Sequence", "normalizers": parts}


def replacement(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def template(names):
    single = [{"Sequence": {"id": name, "type_id": 0}} for name in names]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BPE = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
TOKENIZERS = {
    "nested deep": (
        lambda f: (f / "tokenizer.json").write_text("[" * 1_000_000),
        "tokenizer.json: not a tokenizer",
    ),
    "normalizers nested deep": (
        lambda f: edit_tokenizer(f, normalizer=nested(120)),
        "tokenizer.json: not a tokenizer",
    ),
    "10 GB": (
        lambda f: os.truncate(f / "tokenizer.json", 10**10),
        "tokenizer.json: expected at most",
    ),
    "a token beyond the model": (
        lambda f: edit_vocab(f, zzz=2**32 - 1),
        "tokenizer.json: token 4294967295 does not fit a model with 320 rows",
    ),
    "a token that is no number": (lambda f: edit_vocab(f, zzz=-1), "not a tokenizer"),
    "paths for a vocabulary": (
        lambda f: edit_tokenizer(
            f, model=BPE | {"vocab": "../../etc/passwd", "merges": "/etc/passwd"}
        ),
        "tokenizer.json: not a tokenizer",
    ),
    "merges of tokens that are not there": (
        lambda f: edit_tokenizer(f, model=BPE | {"vocab": {"a": 0}, "merges": [["b", "c"]]}),
        "tokenizer.json: not a tokenizer",
    ),
    "a pattern that is none": (
        lambda f: edit_tokenizer(
            f,
            pre_tokenizer=split({"Regex": "(" * 5000}),
        ),
        "tokenizer.json: not a tokenizer",
    ),
    "a replacement repeated": (
        lambda f: edit_tokenizer(f, normalizer=sequence([replacement("a", "aa")] * 8)),
        "normalizer: makes a text 256 times as long",
    ),
    "very many replacements": (
        lambda f: edit_tokenizer(f, normalizer=sequence([replacement("a", "aa")] * 34)),
        "normalizer: expected a sequence of at most 8 parts",
    ),
    "a replacement of nothing": (
        lambda f: edit_tokenizer(f, normalizer=replacement("", "x")),
        "normalizer: Replace of {'String': ''}",
    ),
    "nothing before a text, which ends in a panic": (
        lambda f: edit_tokenizer(f, normalizer={"type": "Prepend", "prepend": ""}),
        "normalizer: Prepend of ''",
    ),
    "a pattern in a replacement": (
        lambda f: edit_tokenizer(f, decoder=replacement("", "x") | {"pattern": {"Regex": "(a+)+"}}),
        "decoder: Replace of {'Regex': '(a+)+'}",
    ),
    "a pattern that backtracks for ever": (
        lambda f: edit_tokenizer(
            f, pre_tokenizer=split({"Regex": r"(\w+\s?)+$"}), normalizer={"type": "NFC"}
        ),
        "pre_tokenizer: the pattern",
    ),
    "bytes twice": (
        lambda f: edit_tokenizer(
            f, pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES, BYTES]}
        ),
        "pre_tokenizer: ByteLevel twice",
    ),
    "a part that is not known": (
        lambda f: edit_tokenizer(f, normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "normalizer 'Precompiled'",
    ),
    "a template that repeats the text": (
        lambda f: edit_tokenizer(f, post_processor=template(["A"] * 5)),
        "post_processor: expected a template with the text once",
    ),
    "a prefix that ends in a panic": (
        lambda f: edit_tokenizer(
            f,
            model=BPE
            | {"continuing_subword_prefix": "long", "vocab": {"a": 0}, "merges": [["a", "a"]]},
        ),
        "model: continuing_subword_prefix 'long'",
    ),
    "an unknown token that is not there": (
        lambda f: edit_tokenizer(
            f, model=BPE | {"unk_token": "?", "vocab": {"a": 0}, "merges": []}
        ),
        "model: unk_token '?' is not in its vocab",
    ),
    "another kind of model": (
        lambda f: edit_tokenizer(f, model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
        "expected a model of type BPE, got 'Unigram'",
    ),
    "an added token that is no object": (
        lambda f: edit_tokenizer(f, added_tokens=[5]),
        "tokenizer.json: not a tokenizer",
    ),
    "a link to a device": (
        lambda f: link(f, "tokenizer.json", "/dev/zero"),
        "tokenizer.json: no such file",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("good"))
    (folder / "manifest.json").unlink()  # an attacker would write one that fits
    return folder


@pytest.fixture
def folder(tmp_path, good):
    return shutil.copytree(good, tmp_path / "model")


def most_memory():
    return peak("cpu") or 0


def refused(load, folder, message):
    """`load` raises InputError with the message, in time, in memory, and leaves no file."""
    before = sorted(folder.parent.rglob("*"))
    memory = most_memory()
    began = time.process_time()
    with pytest.raises(InputError) as error:
        load(folder)
    assert time.process_time() - began < REFUSED_WITHIN
    assert most_memory() - memory < MEMORY
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(("attack", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(folder, attack, message):
    marker = folder.with_name("attacked")
    attack(folder, marker)
    refused(checkpoint.load, folder, message)
    assert not marker.exists()


@pytest.mark.parametrize(("attack", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(folder, attack, message):
    attack(folder)
    refused(checkpoint.load_tokenizer, folder, message)


def known(folder, **parts):
    """The tokens of a text, by a tokenizer of these parts."""
    edit_tokenizer(folder, **parts)
    return checkpoint.load_tokenizer(folder).encode("The boa sleeps.").tokens


def test_tokenizers_of_others_are_read(folder):
    """As GPT-NeoX, Llama 3 and Llama 2 have them."""
    plain = checkpoint.load_tokenizer(folder).encode("The boa sleeps.").tokens
    assert known(folder, normalizer={"type": "NFC"}, post_processor=BYTES) == plain
    lines = {"type": "Sequence", "pretokenizers": [split({"Regex": LLAMA_3}), BYTES]}
    assert "".join(known(folder, pre_tokenizer=lines, post_processor=template("A"))) == "".join(
        plain
    )
    spaces = sequence([{"type": "Prepend", "prepend": "\u2581"}, replacement(" ", "\u2581")])
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    fuse = [replacement("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    decoder = {"type": "Sequence", "decoders": fuse}
    assert known(folder, normalizer=spaces, pre_tokenizer=None, decoder=decoder)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_a_tokenizer_neither_cuts_nor_pads_a_text(folder):
    """As one could be told to: to nothing, or to a million million tokens."""
    plain = checkpoint.load_tokenizer(folder).encode("The boa sleeps.").ids
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit_tokenizer(folder, padding=padding)
    assert checkpoint.load_tokenizer(folder).encode("The boa sleeps.").ids == plain
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit_tokenizer(folder, padding=None, truncation=truncation)
    assert checkpoint.load_tokenizer(folder).encode("The boa sleeps.").ids == plain


@pytest.fixture
def stopped(tmp_path):
    """A run with a step to do."""
    argv = [*TINY, "--vocab-size", "300", "--data", corpus(tmp_path), "--run", tmp_path / "run"]
    argv += ["--max-steps", "2", "--threads", "1"]
    new_run.start(settings.parse([*map(str, argv)]), Console(quiet=True))
    return tmp_path / "run"


def resume(folder):
    return resume_run(replace(settings.read(folder), resume=True), Ranks(), Console(quiet=True))


def test_a_training_state_with_a_payload(stopped):
    marker = stopped.with_name("attacked")
    (stopped / "last/manifest.json").unlink()
    torch.save({"optimizer": Attack(marker)}, stopped / "last/training_state.pt")
    refused(resume, stopped, "training_state.pt: damaged")
    assert not marker.exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", training_run.WRITTEN)
def test_a_run_does_not_write_through_links(stopped, name):
    outside = stopped.with_name("outside")
    outside.write_text("mine\n")
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).symlink_to(outside)
    refused(resume, stopped, f"{name}: a link")
    assert outside.read_text() == "mine\n"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_checkpoint_does_not_write_through_links(stopped):
    """last.new is written first, and last.old gets the older checkpoint. Neither may be a link."""
    outside = stopped.with_name("outside")
    outside.mkdir()
    (outside / "mine").write_text("mine\n")
    run = resume(stopped)
    for name in ("last.new", "last.old"):
        (stopped / name).symlink_to(outside)
        with pytest.raises(InputError, match=r"/last.*: cannot be written"):
            training_run.save_last(run)
        (stopped / name).unlink()
    assert [path.name for path in outside.iterdir()] == ["mine"]
    training_run.save_last(run)
    resume(stopped)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_to_files_are_read(folder):
    """As Hugging Face's cache has them."""
    weights = folder / "model.safetensors"
    save_file(
        {k: v for k, v in checkpoint.load(folder).state_dict().items() if k != "lm_head.weight"},
        folder.with_name("blob"),
    )
    weights.unlink()
    weights.symlink_to(folder.with_name("blob"))
    checkpoint.load(folder)
