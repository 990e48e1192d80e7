"""Drawn texts and damaged files: tokenizers lose nothing, readers load or say what is wrong.

A file is damaged as bytes (some exchanged, cut out or put in) or as JSON (a value exchanged).
"""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import saved

from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.text import tokenizer as t

TEXT = "The snake sleeps. The snake wakes, and the snake eats; snakes like stones. " * 3
EXAMPLES = [40, pytest.param(2000, marks=pytest.mark.slow)]


def for_all(examples, *strategies):
    """Run the decorated function on so many examples."""

    def run(check):
        settings(max_examples=examples)(given(*strategies)(check))()

    return run


@pytest.fixture(scope="module")
def bpe():
    return t.train("bpe", [TEXT], 300)


@pytest.fixture(scope="module")
def word():
    return t.train("word", [TEXT], 60)


anything = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)
near = st.text(st.sampled_from(sorted(set(TEXT)) + list("蛇é<|>\n\t ")), max_size=60)
texts = anything | near | st.lists(st.sampled_from([*TEXT.split(" "), t.EOT, "  "])).map(" ".join)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_bpe_loses_nothing(bpe, examples):
    @for_all(examples, texts)
    def check(text):
        ids = t.encode(bpe, text)
        assert t.decode(bpe, ids) == text.encode("utf-8", "replace").decode()
        assert t.eot_id(bpe) not in ids


@pytest.mark.parametrize("examples", EXAMPLES)
def test_word_keeps_every_character_that_it_knows(word, examples):
    known = set(TEXT)

    @for_all(examples, texts)
    def check(text):
        once = t.decode(word, t.encode(word, text))
        sayable = text.encode("utf-8", "replace").decode()
        assert once == "".join(c for c in sayable if c in known)
        assert t.decode(word, t.encode(word, once)) == once


@st.composite
def mutations(draw):
    """What turns the bytes of a file into others."""
    edits = st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["exchange", "cut out", "put in", "end"]),
        st.binary(min_size=1, max_size=8),
    )
    edits = draw(st.lists(edits, min_size=1, max_size=4))

    def mutate(content: bytes) -> bytes:
        for where, how, new in edits:
            at = int(where * len(content))
            rest = {"exchange": at + len(new), "cut out": at + len(new), "put in": at}
            after = content[rest.get(how, len(content)) :]
            content = content[:at] + (b"" if how in ("cut out", "end") else new) + after
        return content

    return mutate


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BPE", "WordLevel", "Unigram", "WordPiece", "Regex", "ByteLevel", "Split"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)


@st.composite
def exchanges(draw):
    """What exchanges values deep in an object, or adds some, or takes some out."""
    edits = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)
    edits = draw(st.lists(st.tuples(edits, st.booleans(), values), min_size=1, max_size=3))

    def mutate(content: bytes) -> bytes:
        whole = json.loads(content)
        for path, drop, value in edits:
            here = whole
            for i, part in enumerate(path):
                keys = [*here] if isinstance(here, dict) else range(len(here))
                if not keys:
                    break
                key = keys[int(part * len(keys))]
                if i + 1 < len(path) and isinstance(here[key], dict | list):
                    here = here[key]
                    continue
                here[key] = value
                if drop:
                    del here[key]
                break
        return json.dumps(whole).encode()

    return mutate


def loaded_or_refused(load, folder, named):
    """What `load` gives, or None after a line that names a path; any other error is one."""
    try:
        return load(folder)
    except InputError as error:
        said = str(error)
    assert str(named) in said
    assert "\n" not in said
    return None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("good"), n_layers=1)
    manifest = folder / "manifest.json"
    return folder, manifest.rename(folder.with_name("manifest.json"))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", [mutations, exchanges])
def test_a_damaged_tokenizer_loads_or_is_refused(good, tmp_path, kind, examples):
    """Whatever loads also reads a text."""
    folder = shutil.copytree(good[0], tmp_path / "m")
    content = (folder / "tokenizer.json").read_bytes()

    @for_all(examples, kind())
    def check(mutate):
        (folder / "tokenizer.json").write_bytes(mutate(content))
        learnt = loaded_or_refused(checkpoint.load_tokenizer, folder, folder / "tokenizer.json")
        if learnt is not None:
            t.decode(learnt, t.encode(learnt, "The boa sleeps 蛇"))


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", mutations),
        ("config.json", exchanges),
        ("model.safetensors", mutations),
        ("pytorch_model.bin", mutations),
        ("manifest.json", mutations),
        ("manifest.json", exchanges),
    ],
)
def test_a_damaged_checkpoint_loads_or_is_refused(good, tmp_path, name, kind, examples):
    folder = shutil.copytree(good[0], tmp_path / "m")
    if name == "manifest.json":
        shutil.copy(good[1], folder)
    if name == "pytorch_model.bin":
        torch.save(dict(checkpoint.load(folder).state_dict()), folder / name)
        (folder / "model.safetensors").unlink()
    content = (folder / name).read_bytes()

    @for_all(examples, kind())
    def check(mutate):
        (folder / name).write_bytes(mutate(content))
        loaded_or_refused(checkpoint.load, folder, folder)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_any_bytes_are_refused(good, tmp_path, name, examples):
    folder = shutil.copytree(good[0], tmp_path / "m")

    @for_all(examples, st.binary(max_size=200))
    def check(content):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            checkpoint.load_all(folder)
        assert str(folder / name) in str(error.value)
