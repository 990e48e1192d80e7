"""Files to documents: which are found, how they are read, refused or said to be left out."""

import json
import os

import pytest

from ysnake.shared.errors import InputError
from ysnake.text import documents as docs
from ysnake.text.documents import Corpus, Form, LeftOut, find_files, read_file


def texts(path, form=None):
    """Whole documents of a file, their pieces joined."""
    out, parts = [], []
    for text, ends in read_file(path, form):
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
    path.write_text("one\n<|endoftext|> \t\ntwo")
    assert texts(path) == ["one", "two"]


def test_jsonl_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines", "other": 1}\n{"text": ""}\n')
    assert texts(path) == ["one", "two\nlines"]


LEGAL = {
    "zero": (r'{"text": "a\u0000b"}', "a\0b"),
    "half a pair": (r'{"text": "a\ud800"}', "a\ud800"),
    "a pair": (r'{"text": "\ud83d\udc0d"}', "🐍"),
    "line breaks of Unicode": ('{"text": "a\u2028b\x85c"}', "a\u2028b\x85c"),
    "a carriage return": ('{"text":\r"a"}\r', "a"),
    "a long number": ('{"n": ' + "9" * 5000 + ', "text": "a"}', "a"),
    "not a number": ('{"n": NaN, "text": "a"}', "a"),
    "given twice": ('{"text": "a", "text": "b"}', "b"),
    "end of text": ('{"text": "a\\n<|endoftext|>\\nb"}', "a\n<|endoftext|>\nb"),
}


@pytest.mark.parametrize("name", LEGAL)
def test_unusual_lines_of_jsonl_are_read(tmp_path, name):
    line, text = LEGAL[name]
    path = tmp_path / "A.JSONL"
    path.write_bytes(f'{line}\n{{"text": null}}\n{{"text": "last"}}'.encode())
    assert texts(path) == [text, "last"]


REFUSED = {
    "not JSON (character 1": "x",
    "expected an object with a field `text`": "[]",
    'no field `text`, only "title", "body"; --text-field': '{"title": "x", "body": "y"}',
    "expected `text` to be a string": '{"text": 3}',
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_lines_of_jsonl_are_named(tmp_path, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{REFUSED[message]}\n')
    with pytest.raises(InputError) as error:
        texts(path)
    assert f"{path}, line 2: {message}" in str(error.value)


def test_another_field_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "text": 5}\n')
    assert texts(path, Form(text_field="body")) == ["one"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_long_documents_come_in_pieces(tmp_path, monkeypatch, size):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\ntwo three four\n<|endoftext|>\nfive\n\n<|endoftext|>\nsix")
    monkeypatch.setattr(docs, "PIECE", 1000)
    whole = texts(path)
    monkeypatch.setattr(docs, "PIECE", max(size, 14))
    assert texts(path) == whole == ["one\n\n\ntwo three four", "five", "six"]


def test_where_a_document_is_cut_into_pieces_changes_no_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    monkeypatch.setattr(docs, "PIECE", 14)
    for content, expected in (
        ("x" * 14 + "<|endoftext|>\nend", ["x" * 14 + "<|endoftext|>\nend"]),
        ("x" * 13 + "\n<|endoftext|>\nlast", ["x" * 13, "last"]),
        ("x" * 13 + "\n" * 40 + "<|endoftext|>\nlast", ["x" * 13, "last"]),
        ("x" * 13 + "\n" * 40 + "y\n", ["x" * 13 + "\n" * 40 + "y"]),
        ("\n" * 40 + "x", ["x"]),
    ):
        path.write_text(content)
        assert texts(path) == expected


def test_a_long_line_of_jsonl_comes_in_pieces_of_whole_words(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "PIECE", 100)
    text = " ".join(f"word{i}" for i in range(200))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "x" * 450}))
    assert texts(path) == [text, "x" * 450]
    pieces = [piece for piece, _ in read_file(path)]
    assert max(map(len, pieces)) <= 110
    assert len(pieces) >= 20
    assert all(piece.startswith((" ", "word0", "x")) for piece in pieces)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings(tmp_path, encoding, name):
    text = '{"text": "naïve"}' if name == "a.jsonl" else "naïve"
    (tmp_path / name).write_text(text, encoding=encoding)
    assert texts(tmp_path / name, Form(encoding)) == ["naïve"]


@pytest.mark.parametrize("at", [0, 1, 8191, 8192, 3 << 20])
@pytest.mark.parametrize("start", [b"a", "é".encode()])
def test_a_byte_that_is_not_utf8_is_named_where_it_is(tmp_path, at, start):
    path = tmp_path / "a.txt"
    at -= at % len(start)
    path.write_bytes(start * (at // len(start)) + b"\xe9, and more")
    with pytest.raises(InputError, match=rf"UTF-8 \(byte {at}\); if it is cp1252: --encoding"):
        texts(path)


def test_broken_endings_and_other_bad_bytes_are_named(tmp_path):
    path = tmp_path / "a.txt"
    binary = "a binary file (leave it out), or text that needs --encoding utf-16"
    wide = "a damaged or binary file (leave it out), or text that needs --encoding utf-16-le or "
    for content, form, message in (
        (b"ab\xe2\x82", Form(), "not text in UTF-8 (byte 2)"),
        ("a".encode("utf-16"), Form(), "not text in UTF-8 (byte 0); if it is utf-16: --encoding"),
        (b"a\xff", Form("ascii"), "not text in ASCII (byte 1)"),
        (b"a\0b", Form(), binary),
        (b"\xff\0b", Form(), "not text in UTF-8 (byte 0); a binary file"),
        (b"abc", Form("utf-16"), "not text in UTF-16 (byte 0); if it is utf-8: --encoding utf-8"),
        # the advice is never the encoding that has just failed
        ("a\n".encode("utf-16-le"), Form(), binary),
        ("a\n".encode("utf-16-le"), Form("UTF16"), f"not text in UTF16 (byte 0); {wide}"),
        (
            "a".encode("utf-16") + b"\0\xd8a\0",
            Form("utf-16"),
            f"not text in UTF-16 (byte 4); {wide}",
        ),
        ("a\0b".encode("utf-16"), Form("utf-16"), wide),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            texts(path, form)
        assert f"{path}: {message}" in str(error.value)


def test_folders(tmp_path):
    for name in ("b.TXT", "a.md", "sub/c.Jsonl", "README.md", ".hidden/d.txt", "e.pdf", "f.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    left_out = LeftOut()
    for name in ("settings.json", "metrics.jsonl", "samples.txt"):
        (tmp_path / "runs/first").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/first" / name).write_text("{}")
    found = find_files([tmp_path, tmp_path / "b.TXT"], left_out)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["a.md", "b.TXT", "sub/c.Jsonl"]
    assert find_files([tmp_path / "README.md"]) == [tmp_path / "README.md"]
    lines = "\n".join(left_out.lines())
    for line in (
        "left out: hidden files and folders: 1",
        "left out: README files: 1",
        "left out: folders of runs and checkpoints: 1",
        "left out: files that end in .pdf: 1; pdftotext",
        "left out: files that end in .csv: 1; pandas",
    ):
        assert line in lines


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "corpus/sub").mkdir(parents=True)
    for name in ("far/book.txt", "corpus/a.txt", "corpus/sub/b.txt"):
        (tmp_path / name).write_text(name)
    for link, to in {"linked": "far", "again": "far", "circle": "corpus", "lost": "no.txt"}.items():
        (tmp_path / "corpus" / link).symlink_to(tmp_path / to)
    (tmp_path / "corpus/c.txt").symlink_to("a.txt")
    left_out = LeftOut()
    found = find_files([tmp_path / "corpus", tmp_path / "far"], left_out)
    assert sorted(p.name for p in found) == ["a.txt", "b.txt", "book.txt"]
    assert left_out.lines() == ["left out: links that lead nowhere, pipes and devices: 1"]
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe\.txt: expected a regular file"):
        find_files([tmp_path / "pipe.txt"])


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    names = ("x.pdf", "x.jpg", "x.txt.GZ", "x.csv", "x.parquet", "x.html", "x.json")
    for name in (*names, "other/x.csv"):
        (tmp_path / name).write_text("x")
    for name, *messages in (
        ("missing", "no such file or folder"),
        ("empty", "no .txt, .md, .jsonl file in this folder"),
        ("other", "no .txt, .md, .jsonl file in this folder", "end in .csv: 1; pandas makes"),
        *((name, "expected a folder or a .txt, .md, .jsonl file") for name in names),
        ("x.txt.GZ", "unpack them first"),
        ("x.csv", "pandas.read_csv("),
        ("x.parquet", "pandas.read_parquet("),
        ("x.json", "pandas.read_json("),
        ("x.html", "pandoc -t plain"),
    ):
        with pytest.raises(InputError) as error:
            find_files([tmp_path / name])
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert all(message in str(error.value) for message in messages)


def folder_of(tmp_path, **counts):
    """A folder with files of so many documents."""
    for name, n in counts.items():
        text = "\n<|endoftext|>\n".join(f"{name}{i}" for i in range(n))
        (tmp_path / f"{name}.txt").write_text(text)
    return find_files([tmp_path])


def test_a_limit_takes_as_many_of_each_file_and_says_how_many_are_left(tmp_path):
    files = folder_of(tmp_path, a=1, b=4, c=3, d=0)
    corpus = Corpus(files, max_documents=6)
    for _ in range(2):
        assert [text for text, _ in corpus.pieces()] == ["a0", "b0", "b1", "b2", "c0", "c1"]
        assert corpus.left_out.lines() == [
            "left out: files without text: 1",
            "left out: documents beyond --max-documents 6: 2 of 8",
        ]
    for limit in (8, 100, None):
        corpus = Corpus(files, max_documents=limit)
        assert len(list(corpus.pieces())) == 8
        assert corpus.left_out.lines() == ["left out: files without text: 1"]


def test_a_limit_far_below_a_large_corpus_does_not_read_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "COUNTED", 10)
    corpus = Corpus(folder_of(tmp_path, a=3000, b=4000), max_documents=6)
    assert len(list(corpus.pieces())) == 6
    assert "documents beyond --max-documents 6: 8 or more" in corpus.left_out.lines()[0]


def test_more_files_than_a_process_may_open(tmp_path):
    resource = pytest.importorskip("resource")
    files = folder_of(tmp_path, **{f"n{i:03}": 2 for i in range(200)})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, before[1]))
    try:
        assert len(list(Corpus(files, max_documents=300).pieces())) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_lines_without_text_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": null}\n')
    corpus = Corpus([path])
    assert [text for text, _ in corpus.pieces()] == ["one"]
    assert corpus.left_out.lines() == ["left out: lines of .jsonl with nothing in `text`: 2"]


def test_the_shipped_corpus_reads_back_as_its_readme_says():
    from small import ROOT

    folder = ROOT / "training_data"
    readme = (folder / "README.md").read_text()
    total = []
    for path in find_files([folder]):
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
