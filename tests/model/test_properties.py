"""Drawn texts and bytes: tokenizers lose nothing, readers say what is wrong with any bytes."""

import shutil

import pytest
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


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("good"), n_layers=1)
    (folder / "manifest.json").unlink()
    return folder


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_any_bytes_are_refused(good, tmp_path, name, examples):
    folder = shutil.copytree(good, tmp_path / "m")

    @for_all(examples, st.binary(max_size=200))
    def check(content):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            checkpoint.load_all(folder)
        assert str(folder / name) in str(error.value)
