"""What is held out, tokens on disk, cutting windows. Reading files is in test_documents.py."""

from itertools import chain

import numpy as np
import pytest
from small import corpus

from ysnake.text import data
from ysnake.text import tokenizer as tokenizers
from ysnake.text.data import IGNORED, Tokens


@pytest.fixture
def written(tmp_path):
    """Tokens of a small corpus on disk, with the tokenizer and the documents they came from."""
    path = corpus(tmp_path, documents=25)
    documents = [text for text, _ in data.read_file(path)]
    tokenizer = tokenizers.train("bpe", documents, 320)
    eot = tokenizers.eot_id(tokenizer)
    pieces = data.read_file(path)
    counts = data.write_tokens(pieces, tokenizer, eot, eot, tmp_path, lambda n: None)
    sides = [
        Tokens.open(tmp_path / f"{side}.tokens", tokenizer.get_vocab_size(), eot, eot)
        for side in ("train", "val")
    ]
    return tokenizer, documents, counts, *sides


def test_tokens_on_disk_are_documents_with_their_first_and_last_token(written):
    tokenizer, documents, counts, train, val = written
    held_out = [documents[counts.train_documents - 4]]
    kept = [d for d in documents if d not in held_out]
    assert (counts.train_documents, counts.val_documents) == (24, 1)
    assert counts.train_words == sum(len(d.split()) for d in kept)
    for tokens, expected in ((train, kept), (val, held_out)):
        with_ends = [[0, *tokenizers.encode(tokenizer, d), 0] for d in expected]
        assert tokens.ids.tolist() == list(chain(*with_ends))


def sides(pieces):
    """The text of each side of the split, documents marked by bars."""
    out = ["", ""]
    for part in data.split(pieces):
        out[part.held_out] += part.text + ("|" if part.ends or part.cut else "")
    return out


def test_of_many_small_documents_one_in_twenty_is_held_out_whole():
    documents = [f"note {i:03} " * 5 for i in range(500)]
    kept, held_out = (side.split("|")[:-1] for side in sides((d, True) for d in documents))
    assert held_out == documents[19::20]
    assert sorted(kept + held_out) == documents


@pytest.mark.parametrize(
    "lengths",
    [[300_000], [3_500, 700], [700, 3_500], [30_000, 5_000], [2_000] * 12, [90, 90, 50_000]],
)
def test_long_documents_lose_their_ends_only(lengths):
    words = ["viper", "boa", "sleeps", "in", "the", "grass"]
    documents = [" ".join(words[k % 6] for k in range(n // 5)) for n in lengths]
    kept, held_out = sides((d, True) for d in documents)
    total = sum(map(len, documents))
    assert 0.02 * total < len(held_out) < 0.06 * total
    rest = held_out
    for document, start in zip(documents, kept.split("|"), strict=False):
        assert document.startswith(start)
        assert len(start) >= len(document) // 2
        if start != document:
            end, _, rest = rest.partition("|")
            assert start + end == document
            assert end.startswith(" ")
    assert not rest


def test_a_document_in_many_pieces_loses_a_passage_of_each():
    pieces = [("river stone " * 1000, i == 9) for i in range(10)] + [("x" * 100, True)] * 30
    parts = list(data.split(pieces))
    assert "".join(part.text for part in parts) == "".join(text for text, _ in pieces)
    long = parts[: next(i for i, part in enumerate(parts) if part.ends) + 1]
    assert [part.held_out for part in long] == [False, True] * 10
    assert sum(part.ends for part in parts) == 31
    held_out = sum(len(part.text) for part in parts if part.held_out)
    assert held_out == pytest.approx(sum(len(text) for text, _ in pieces) / 20, rel=0.02)


def test_a_cut_document_is_framed_on_both_sides(tmp_path):
    tokenizer = tokenizers.train("bpe", ["a b c " * 100], 260)
    pieces = [("a b c " * 900, False), ("d e f " * 900, True), ("g", True)]
    counts = data.write_tokens(pieces, tokenizer, 0, 0, tmp_path, lambda n: None)
    train, val = (np.fromfile(tmp_path / f"{s}.tokens", "<u2") for s in ("train", "val"))
    assert (counts.train_documents, counts.val_documents, counts.val_cut) == (2, 0, 1)
    assert (len(train), len(val)) == (counts.train_tokens, counts.val_tokens)
    for ids, documents in ((train, 3), (val, 2)):
        assert ids[0] == ids[-1] == 0
        assert (ids == 0).sum() == 2 * documents
    text = "".join(text for text, _ in pieces)
    assert sorted(tokenizers.decode(tokenizer, [*train, *val])) == sorted(text)
    assert "2 documents to train on" in counts.lines()[0]
    assert "parts of 1 held out" in counts.lines()[0]


def test_too_little_text_holds_nothing_out_and_says_so(tmp_path):
    tokenizer = tokenizers.train("bpe", ["a b c " * 100], 260)
    pieces = [("a b c " * 50, True)] * 3
    counts = data.write_tokens(pieces, tokenizer, 0, 0, tmp_path, lambda n: None)
    assert counts.val_tokens == (tmp_path / "val.tokens").stat().st_size == 0
    assert any("too little text to hold any out" in line for line in counts.lines())


def test_what_a_tokenizer_drops_is_counted(tmp_path):
    tokenizer = tokenizers.train("word", ["the boa sleeps"], 100)
    pieces = [("the boa sleeps", True), ("the \u86c7 sleeps", True)]
    counts = data.write_tokens(pieces, tokenizer, 0, 0, tmp_path, lambda n: None)
    assert (counts.dropped, counts.bytes) == (3, 14 + 14)
    assert "does not know: 3 bytes (10.7%)" in counts.lines()[-1]


def test_no_target_crosses_a_document():
    ids = np.array([0, 5, 6, 0, 0, 7, 0, 0, 8, 9, 0], np.uint16)
    batch = Tokens(ids, 0, 0).windows(np.array([0, 3, 9]), 8)
    assert batch.ids[0].tolist() == [0, 5, 6, 0, 0, 7, 0, 0]
    assert batch.targets[0].tolist() == [5, 6, 0, IGNORED, 7, 0, IGNORED, 8]
    assert batch.seq_idx[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert batch.starts_anew.tolist() == [True, False, False]
    assert batch.seq_idx[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 2]
    # the ring: after the last token comes the first, of another document
    assert batch.ids[2].tolist() == [9, 0, 0, 5, 6, 0, 0, 7]
    assert batch.targets[2].tolist() == [0, IGNORED, 5, 6, 0, IGNORED, 7, 0]
    assert batch.n_targets == 17


@pytest.mark.parametrize(
    ("length", "seq_len", "batch"), [(1000, 10, 4), (1003, 10, 7), (50, 40, 9)]
)
def test_an_epoch_sees_every_window_once(length, seq_len, batch):
    tokens = Tokens(np.arange(1, length + 1), 0, 0)
    per_epoch = length // seq_len
    seen = []
    for index in range(-(-3 * per_epoch // batch)):
        seen += data.training_windows(tokens, seq_len, batch, index, seed=3).ids[:, 0].tolist()
    epochs = [seen[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        assert len({(s - epoch[0]) % length // seq_len for s in epoch}) == per_epoch
    assert epochs[0] != epochs[1]


def test_the_windows_of_an_epoch_have_no_pattern():
    """An arithmetic progression would give each batch windows of few documents."""
    tokens = Tokens(np.arange(1, 4001), 0, 0)
    seen = [data.training_windows(tokens, 10, 4, i, seed=3).ids[:, 0] for i in range(100)]
    distances = np.diff(np.concatenate(seen)) % 4000
    assert len(set(distances.tolist())) > 100


def test_windows_depend_on_seed_and_index_alone():
    tokens = Tokens(np.arange(1, 1000), 0, 0)
    first, again, other, later = (
        data.training_windows(tokens, 10, 4, index, seed).ids.tolist()
        for index, seed in ((5, 0), (5, 0), (5, 1), (6, 0))
    )
    assert first == again
    assert first != other
    assert first != later


def test_consecutive_windows_read_on():
    tokens = Tokens(np.arange(1, 100), 0, 0)
    first, second = (data.consecutive_windows(tokens, 8, 3, i) for i in (0, 1))
    assert (first.ids[:, -1] + 1 == second.ids[:, 0]).all()
    assert (first.targets[:, -1] == second.ids[:, 0]).all()


@pytest.mark.parametrize(
    ("length", "limit"), [(100, 1000), (100, 100), (5, 100), (1, 100), (0, 10)]
)
def test_held_out_windows_cover_each_target_once(length, limit):
    tokens = Tokens(np.arange(1, length + 1), 0, 0)
    targets = []
    for batch in data.held_out_windows(tokens, 8, 3, limit):
        targets += batch.predicted.tolist()
    assert sorted(targets) == list(range(2, length + 1))


def test_held_out_windows_over_the_limit_come_from_all_parts():
    tokens = Tokens(np.arange(1, 1001), 0, 0)
    batches = list(data.held_out_windows(tokens, 8, 3, 80))
    begins = np.concatenate([batch.ids[:, 0] for batch in batches])
    assert len(begins) == 10
    assert begins[0] == 1
    assert set(np.diff(begins)) <= {96, 104}  # 100 tokens, in whole windows


def test_prompts_come_from_the_middle(written):
    tokenizer, documents, _, train, _ = written
    prompts = [tokenizers.decode(tokenizer, ids) for ids in data.middles(train, 5)]
    assert prompts
    for prompt in prompts:
        assert any(prompt in d[1:-1] for d in documents)


def test_larger_vocabularies_take_four_bytes(tmp_path):
    assert data.token_dtype(1 << 16) == np.dtype("<u2")
    assert data.token_dtype((1 << 16) + 1) == np.dtype("<u4")
