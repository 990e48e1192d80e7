"""Reading documents, writing tokens, cutting windows."""

import json
from itertools import chain

import numpy as np
import pytest
from small import corpus

from ysnake import data
from ysnake import tokenizer as tokenizers
from ysnake.config import InputError
from ysnake.data import IGNORED, Tokens


def texts(path):
    """Whole documents of a file, their pieces joined."""
    out, parts = [], []
    for text, ends in data.read_file(path):
        parts.append(text)
        if ends:
            out.append("".join(parts))
            parts = []
    assert not parts
    return out


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\r\nline\n<|endoftext|>\n\n<|endoftext|>\n\n  two\n\nx\n\n<|endoftext|>\n"
    )
    assert texts(path) == ["one\nline", "  two\n\nx"]
    path.write_text("a <|endoftext|> inside a line\n<|endoftext|>")
    assert texts(path) == ["a <|endoftext|> inside a line"]


def test_jsonl_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines", "other": 1}\n{"text": ""}\n')
    assert texts(path) == ["one", "two\nlines"]
    for bad in ('{"txt": "x"}', "x", '{"text": 3}', "[]"):
        path.write_text(f'{{"text": "one"}}\n{bad}\n')
        with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected"):
            texts(path)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_long_documents_come_in_pieces(tmp_path, monkeypatch, size):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\ntwo three four\n<|endoftext|>\nfive\n\n<|endoftext|>\nsix")
    monkeypatch.setattr(data, "PIECE", 1000)
    whole = texts(path)
    monkeypatch.setattr(data, "PIECE", max(size, 14))
    assert texts(path) == whole == ["one\n\n\ntwo three four", "five", "six"]


def test_folders(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl", "README.md", ".hidden/d.txt", "e.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = data.find_files([tmp_path, tmp_path / "b.txt"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a.md", "b.txt", "sub/c.jsonl"]
    assert data.find_files([tmp_path / "README.md"]) == [tmp_path / "README.md"]


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pdf").write_text("x")
    for name, message in {
        "missing": "no such file or folder",
        "empty": "no .txt, .md, .jsonl file in this folder",
        "x.pdf": "expected a folder or a .txt, .md, .jsonl file",
    }.items():
        with pytest.raises(InputError) as error:
            data.find_files([tmp_path / name])
        assert f"{tmp_path / name}: {message}" in str(error.value)
    for content, message in {
        b"a\0b": "a binary file",
        b"\xff\xfe\x00": "not text in UTF-8",
    }.items():
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.txt: {message}"):
            texts(tmp_path / "x.txt")


def test_a_limit_takes_documents_in_turn(tmp_path):
    for name, n in {"a": 1, "b": 4, "c": 3}.items():
        text = "\n<|endoftext|>\n".join(f"{name}{i}" for i in range(n))
        (tmp_path / f"{name}.txt").write_text(text)
    files = data.find_files([tmp_path])
    taken = [text for text, _ in data.read_documents(files, 6)]
    assert taken == ["a0", "b0", "c0", "b1", "c1", "b2"]
    assert len(list(data.read_documents(files, 100))) == len(list(data.read_documents(files))) == 8


@pytest.fixture
def written(tmp_path):
    """Tokens of a small corpus on disk, with the tokenizer and the documents they came from."""
    path = corpus(tmp_path, documents=25)
    documents = texts(path)
    tokenizer = tokenizers.train("bpe", documents, 320)
    eot = tokenizers.eot_id(tokenizer)
    pieces = data.read_file(path)
    counts = data.write_tokens(pieces, tokenizer, eot, eot, tmp_path, lambda n: None)
    sides = [
        Tokens.open(tmp_path / f"{side}.tokens", tokenizer.get_vocab_size(), eot, eot)
        for side in ("train", "val")
    ]
    return tokenizer, documents, counts, *sides


def test_tokens_on_disk_are_framed_documents(written):
    tokenizer, documents, counts, train, val = written
    held_out = [documents[1], documents[21]]
    kept = [d for d in documents if d not in held_out]
    assert (counts.train_documents, counts.val_documents) == (23, 2)
    assert counts.train_words == sum(len(d.split()) for d in kept)
    for tokens, expected in ((train, kept), (val, held_out)):
        framed = [[0, *tokenizers.encode(tokenizer, d), 0] for d in expected]
        assert tokens.ids.tolist() == list(chain(*framed))


def test_a_single_document_keeps_its_end_for_evaluation(tmp_path):
    tokenizer = tokenizers.train("bpe", ["a b c " * 100], 260)
    pieces = [("a b c " * 50, False), ("d e f " * 50, True)]
    counts = data.write_tokens(pieces, tokenizer, 0, 0, tmp_path, lambda n: None)
    whole = [0, *tokenizers.encode(tokenizer, "a b c " * 50)]
    whole += [*tokenizers.encode(tokenizer, "d e f " * 50), 0]
    sides = [np.fromfile(tmp_path / f"{s}.tokens", "<u2").tolist() for s in ("train", "val")]
    assert sides[0] + sides[1] == whole
    assert counts.val_tokens == len(whole) // 20 == len(sides[1])


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


@pytest.mark.parametrize(("length", "limit"), [(100, 1000), (100, 60), (5, 100), (1, 100), (0, 10)])
def test_held_out_windows_cover_each_target_once(length, limit):
    tokens = Tokens(np.arange(1, length + 1), 0, 0)
    targets = []
    for batch in data.held_out_windows(tokens, 8, 3, limit):
        targets += batch.targets[batch.targets != IGNORED].tolist()
    assert sorted(targets) == list(range(2, min(length, limit) + 1))


def test_prompts_come_from_the_middle(written):
    tokenizer, documents, _, train, _ = written
    prompts = [tokenizers.decode(tokenizer, ids) for ids in data.middles(train, 5)]
    assert prompts
    for prompt in prompts:
        assert any(prompt in d[1:-1] for d in documents)


def test_larger_vocabularies_take_four_bytes(tmp_path):
    assert data.token_dtype(1 << 16) == np.dtype("<u2")
    assert data.token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_the_shipped_corpus_reads_back_as_its_readme_says():
    from small import ROOT

    folder = ROOT / "training_data"
    readme = (folder / "README.md").read_text()
    total = []
    for path in data.find_files([folder]):
        documents = texts(path)
        assert f"| `{path.name}` | {len(documents)} |" in readme
        total += documents
    words = sum(len(d.split()) for d in total)
    assert f"{len(total)} short documents, {words:,} words" in readme
    assert len(total) >= 300
    assert words >= 45_000
    sentences = [s for d in total for s in d.replace("\n", " ").split(". ") if len(s.split()) > 4]
    assert len(sentences) == len(set(sentences))
    openings = [" ".join(d.split()[:3]) for d in total]
    assert len(openings) - len(set(openings)) <= 3
    assert json.dumps(total).count("\\ufffd") == 0
