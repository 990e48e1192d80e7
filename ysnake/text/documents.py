"""From files to documents: which files belong to a corpus, how they are read, what is left out.

A document is read as pieces of about a million characters, so memory does not grow with its size.
"""

import codecs
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ysnake.shared.errors import InputError, why
from ysnake.shared.run_files import is_model
from ysnake.text.tokenizer import EOT

PIECE = 1 << 20  # characters; a longer document is read in pieces of about this size
COUNTED = 1 << 28  # characters that are read to count the documents beyond a limit
SUFFIXES = (".txt", ".md", ".jsonl")
READS = ", ".join(SUFFIXES)
_SPACE = re.compile(r"\s")

_UNPACK = "unpack them first, for instance with gunzip -k or unzip"
_TABLE = (
    "pandas makes a .jsonl of them, a line for each row: "
    'pandas.read_{}("a{}").to_json("a.jsonl", orient="records", lines=True)'
)
_PANDOC = "pandoc makes a .txt of them: pandoc -t plain a{} -o a.txt"
CONVERT = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"), _UNPACK),
    ".csv": _TABLE.format("csv", ".csv"),
    ".parquet": _TABLE.format("parquet", ".parquet"),
    ".json": _TABLE.format("json", ".json"),
    ".pdf": "pdftotext makes a .txt of them: pdftotext a.pdf a.txt",
    ".ndjson": "rename them to .jsonl",
    ".text": "rename them to .txt",
    **{end: _PANDOC.format(end) for end in (".html", ".htm", ".docx", ".odt", ".epub", ".rtf")},
}

Piece = tuple[str, bool]  # a text, and whether it ends its document


@dataclass(frozen=True)
class Form:
    """How files are read: their encoding, and the field of .jsonl that holds the text."""

    encoding: str = "utf-8"
    text_field: str = "text"


@dataclass
class LeftOut:
    """What is not used of the user's files, counted by its reason."""

    files: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)  # files, by an ending that is not read
    texts: Counter[str] = field(default_factory=Counter)
    beyond_limit: str | None = None

    def lines(self) -> list[str]:
        """One line for each reason, with its number."""
        known = {end: n for end, n in self.endings.items() if end in CONVERT}
        other = {end or "none": n for end, n in self.endings.items() if end not in CONVERT}
        found = [f"files that end in {end}: {n:,}; {CONVERT[end]}" for end, n in known.items()]
        if other:
            ends = ", ".join(sorted(other)[:10])
            found.append(f"files with an ending that is not read ({ends}): {sum(other.values()):,}")
        found += [f"{what}: {n:,}" for what, n in (self.files + self.texts).items()]
        return [f"left out: {line}" for line in [*found, self.beyond_limit] if line]


def find_files(paths: Iterable[Path], left_out: LeftOut | None = None) -> list[Path]:
    """The .txt, .md and .jsonl files among `paths` and in folders among them, in a fixed order.

    Linked folders are followed. A file with several names is used once. The README and the hidden
    files of a folder describe the data and are left out. So are runs and checkpoints in it.

    Raises:
        InputError: a path is missing, has another ending, or is a run or a checkpoint, or a folder
            has no file to read.
    """
    left_out = left_out or LeftOut()
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        suffix = path.suffix.lower()
        if is_model(path):
            raise InputError(
                f"{path}: a run or a checkpoint, no text to read; `ysnake evaluate` takes it "
                "before the options, `ysnake train` after --from or --tokens-from"
            )
        elif path.is_dir():
            files = _files_in(path, left_out)
            if not files:
                why = "".join(f"; {line}" for line in left_out.lines())
                raise InputError(f"{path}: no {READS} file in this folder{why}")
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif suffix not in SUFFIXES:
            how = f"; {CONVERT[suffix]}" if suffix in CONVERT else ""
            raise InputError(f"{path}: expected a folder or a {READS} file{how}")
        elif not path.is_file():  # a pipe can be read only once
            raise InputError(f"{path}: expected a regular file")
        else:
            files = [path]
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _files_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """The files to read in a folder and below."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {why(error)}") from error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link back, or a second link to one folder
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        hidden = sum(name.startswith(".") for name in (*folders, *names))
        left_out.files["hidden files and folders"] += hidden
        visible = [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(name for name in visible if not is_model(Path(place, name)))
        left_out.files["folders of runs and checkpoints"] += len(visible) - len(folders)
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if not path.is_file():
                left_out.files["links that lead nowhere, pipes and devices"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                left_out.endings[path.suffix.lower()] += 1
            elif path.stem.lower() == "readme":
                left_out.files["README files"] += 1
            else:
                files.append(path)
    return sorted(files)


def read_file(
    path: Path, form: Form | None = None, left_out: LeftOut | None = None
) -> Iterator[Piece]:
    """The documents of a file, in pieces; empty documents are left out.

    In .txt and .md a line `<|endoftext|>` stands between documents; in .jsonl each line is an
    object with a field that holds one.

    Raises:
        InputError: the file cannot be read, or its content is wrong. The message names the place.
    """
    form, left_out = form or Form(), left_out or LeftOut()
    jsonl = path.suffix.lower() == ".jsonl"
    utf8 = codecs.lookup(form.encoding).name == "utf-8"
    encoding = "utf-8-sig" if utf8 else form.encoding
    try:
        # \r is white space in JSON, so only \n ends a line of .jsonl
        with path.open(encoding=encoding, newline="\n" if jsonl else None) as file:
            pieces = _text_pieces(file, path)
            if jsonl:
                pieces = _jsonl_pieces(file, path, form, left_out)
            empty = True
            for piece in _without_empty_lines(pieces):
                empty = False
                yield piece
            left_out.texts["files without text"] += empty
    except UnicodeError as error:
        with path.open("rb") as file:
            at = _first_bad_byte(file, encoding)
            file.seek(0)
            beginning = file.read(4096)
        raise InputError(
            f"{path}: not text in {form.encoding.upper()} (byte {at}); "
            f"{_remedy(beginning, form.encoding)}"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {why(error)}") from error


def _remedy(beginning: bytes, encoding: str) -> str:
    """What helps where a file with this beginning is not text in the expected encoding."""
    marked = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if marked and not _is_utf16(encoding):
        guess = "utf-16"
    elif marked or b"\0" in beginning:
        return _binary(encoding)
    else:
        guess = "cp1252" if codecs.lookup(encoding).name == "utf-8" else "utf-8"
    return (
        f"if it is {guess}: --encoding {guess} reads all files so, "
        f"iconv -f {guess} -t {encoding} converts one file"
    )


def _binary(encoding: str) -> str:
    """What a file with zeros may be that is not text in this encoding."""
    kind, other = "a binary file", "utf-16"
    if _is_utf16(encoding):  # without a byte order mark utf-16 cannot be read, only these
        kind, other = "a damaged or binary file", "utf-16-le or utf-16-be"
    return f"{kind} (leave it out), or text that needs --encoding {other}"


def _is_utf16(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith("utf-16")


def _without_empty_lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces without the empty lines at the start and end of each document."""
    waiting, newlines = "", 0  # a piece that may be its document's last, and newlines behind it
    for text, ends in pieces:
        body = text.rstrip("\n")
        behind = len(text) - len(body)
        if not waiting:
            body, newlines = body.lstrip("\n"), 0
        if body:
            if waiting:
                yield waiting, False
            waiting, newlines = "\n" * newlines + body, 0
        newlines += behind
        if ends:
            if waiting:
                yield waiting, True
            waiting = ""


def _text_pieces(file: TextIO, path: Path) -> Iterator[Piece]:
    lines: list[str] = []
    size, begins = 0, True
    while line := file.readline(PIECE):  # a line, or a part of a long one
        if "\0" in line:
            raise InputError(f"{path}: {_binary(file.encoding)}")
        if begins and line.rstrip() == EOT:
            yield "".join(lines), True
            lines, size = [], 0
            continue
        begins = line.endswith("\n")
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(lines), False
            lines, size = [], 0
    yield "".join(lines), True


def _jsonl_pieces(file: TextIO, path: Path, form: Form, left_out: LeftOut) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        text = _text_of(line, f"{path}, line {number}", form.text_field)
        if not text.strip("\n"):
            left_out.texts[f"lines of .jsonl with nothing in `{form.text_field}`"] += 1
        start = 0
        while len(text) - start > PIECE:
            end = near_space(text, start + PIECE)
            yield text[start:end], False
            start = end
        yield text[start:], True


def _text_of(line: str, where: str, name: str) -> str:
    """The text in a line of .jsonl. null counts as an empty text."""
    try:
        content: Any = json.loads(line, parse_int=float)  # a number of any length is legal
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON (character {error.colno}: {error.msg})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected an object with a field `{name}`")
    if name not in content:
        others = ", ".join(map(json.dumps, content))[:200]
        raise InputError(
            f"{where}: no field `{name}`, only {others or 'nothing'}; --text-field names another"
        )
    text = content[name]
    if not isinstance(text, str | None):
        raise InputError(f"{where}: expected `{name}` to be a string")
    return text or ""


def near_space(text: str, at: int, within: int = 200) -> int:
    """The position of the first space from `at` on, to cut no word; `at` if there is none near."""
    found = _SPACE.search(text, at, at + within)
    return found.start() if found else at


def _first_bad_byte(file: BinaryIO, encoding: str) -> int:
    """The position of the first byte that is not text in this encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    before, chunk = 0, b"."
    while chunk:
        chunk = file.read(PIECE)
        waiting = len(decoder.getstate()[0])  # bytes read that are not yet a character
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return before - waiting + error.start
        except UnicodeError:  # no byte order mark, for instance
            break
        before += len(chunk)
    return before


def check_form(form: Form) -> None:
    """Raise InputError if the encoding is unknown or the field has no name."""
    try:
        "".encode(form.encoding)
    except (LookupError, ValueError, TypeError) as error:
        raise InputError(
            f"expected one like utf-8, utf-16 or cp1252, got {form.encoding!r}", field="--encoding"
        ) from error
    if not form.text_field:
        raise InputError("expected the name of a field", field="--text-field")


@dataclass
class Corpus:
    """The documents that a user names: their files, how to read them, and what is left out."""

    files: list[Path]
    form: Form = field(default_factory=Form)
    max_documents: int | None = None
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def size(self) -> int | None:
        """Bytes of all files; None if there is a limit of documents."""
        if self.max_documents is not None:
            return None
        return sum(path.stat().st_size for path in self.files)

    def pieces(self) -> Iterator[Piece]:
        """All documents in pieces, file by file, as many of each file as the limit allows."""
        self.left_out.texts.clear()  # else a second pass would count everything twice
        for path, share in zip(self.files, self._shares, strict=True):
            for text, ends in read_file(path, self.form, self.left_out) if share else ():
                yield text, ends
                share -= ends
                if share == 0:
                    break

    @cached_property
    def _shares(self) -> list[float]:
        """How many documents to take from each file: one from each in turn, up to the limit."""
        limit = self.max_documents
        if limit is None:
            return [math.inf] * len(self.files)
        counts, every = self._count(limit)
        # a file without documents is read too, so that it is reported
        shares = [0 if count else math.inf for count in counts]
        turns, left = deque(range(len(counts))), limit
        while turns and left:
            i = turns.popleft()
            if shares[i] < counts[i]:
                shares[i] += 1
                left -= 1
                turns.append(i)
        total = sum(counts)
        if total > limit:
            number = f"{total - limit:,} of {total:,}" if every else f"{total - limit:,} or more"
            self.left_out.beyond_limit = f"documents beyond --max-documents {limit}: {number}"
        return shares

    def _count(self, limit: int) -> tuple[list[int], bool]:
        """The number of documents of each file, and whether all were counted.

        Counting takes time, so it may stop in a file with more than `limit` documents.
        """
        counts, size, every = [], 0, True
        for path in self.files:
            counts.append(0)
            for text, ends in read_file(path, self.form):
                counts[-1] += ends
                size += len(text)
                if counts[-1] > limit and size > COUNTED:
                    every = False
                    break
        return counts, every


def open_corpus(options: Any) -> Corpus:
    """The corpus for a command's options data, encoding, text_field and max_documents.

    Raises:
        InputError: see `find_files` and `check_form`.
    """
    form, left_out = Form(options.encoding, options.text_field), LeftOut()
    check_form(form)
    if not options.data:
        raise InputError("expected files or folders", field="--data")
    return Corpus(find_files(options.data, left_out), form, options.max_documents, left_out)
