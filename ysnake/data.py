"""Documents to training windows: reading files, writing tokens to disk, cutting windows.

Nothing here holds a corpus in memory: documents are read in pieces, tokens are memory-mapped. On
disk a document is bos + text + eos, so that a new one starts exactly where a bos follows an eos.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ysnake.config import IGNORED, InputError
from ysnake.tokenizer import EOT, encode

PIECE = 1 << 20  # characters; a longer document is handled in pieces of about this size
HELD_OUT_EVERY = 20  # one document in so many is held out
SUFFIXES = (".txt", ".md", ".jsonl")

Piece = tuple[str, bool]  # a text, and whether it ends its document


def find_files(paths: Iterable[Path]) -> list[Path]:
    """The .txt, .md and .jsonl files among `paths` and in folders among them, in a fixed order.

    A folder's README and hidden files are about the data, not of it, and are left out.

    Raises:
        InputError: a path is missing, is of another kind, or a folder has nothing to read.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                p
                for p in path.rglob("*")
                if p.suffix in SUFFIXES
                and p.is_file()
                and p.stem.lower() != "readme"
                and not any(part.startswith(".") for part in p.relative_to(path).parts)
            )
            if not found:
                raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
            files += found
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise InputError(f"{path}: expected a folder or a {', '.join(SUFFIXES)} file")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def read_file(path: Path) -> Iterator[Piece]:
    """The documents of a file, in pieces; empty documents are left out.

    In .txt and .md a line `<|endoftext|>` stands between documents; in .jsonl each line is an
    object whose field `text` is one.
    """
    documents = _jsonl_documents if path.suffix == ".jsonl" else _text_documents
    waiting: str | None = None  # one piece is held back, to know whether it is the last
    try:
        with path.open(encoding="utf-8-sig") as file:
            for text, ends in documents(file, path):
                if "\0" in text:
                    raise InputError(f"{path}: a binary file, not text")
                if waiting is None:
                    text = text.lstrip("\n")
                if ends:
                    text = text.rstrip("\n")
                if waiting is not None and (text or not ends):
                    yield waiting, False
                    waiting = None
                if text:
                    waiting = text
                if ends and waiting is not None:
                    yield waiting, True
                    waiting = None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def _text_documents(file: Iterable[str], path: Path) -> Iterator[Piece]:
    lines, size = [], 0
    while line := file.readline(PIECE):
        if line.rstrip("\n") == EOT:
            yield "".join(lines), True
            lines, size = [], 0
            continue
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(lines), False
            lines, size = [], 0
    yield "".join(lines), True


def _jsonl_documents(file: Iterable[str], path: Path) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: expected an object with `text`") from error
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: expected `text` to be a string")
        yield text, True


def read_documents(files: list[Path], max_documents: int | None = None) -> Iterator[Piece]:
    """The documents of all files; with a limit, taken in turn from each file until that."""
    if max_documents is None:
        for path in files:
            yield from read_file(path)
        return
    readers = deque(read_file(path) for path in files)
    taken = 0
    while readers and taken < max_documents:
        reader = readers.popleft()
        for text, ends in reader:
            yield text, ends
            if ends:
                taken += 1
                readers.append(reader)
                break


def split(pieces: Iterable[Piece]) -> Iterator[tuple[str, bool, bool]]:
    """The pieces, each with whether its document is held out: one in twenty, from the second on."""
    document = 0
    for text, ends in pieces:
        yield text, ends, document % HELD_OUT_EVERY == 1
        document += ends


@dataclass(frozen=True)
class Counts:
    """How much was written: documents, tokens and words on either side of the split."""

    train_documents: int
    train_tokens: int
    train_words: int
    val_documents: int
    val_tokens: int


def write_tokens(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    bos_id: int,
    eos_id: int,
    folder: Path,
    progress: Callable[[int], None],
) -> Counts:
    """Encode documents into `folder`/train.tokens and val.tokens, as `split` says.

    A single document cannot be split by document: the last twentieth of its tokens is held out.
    `progress` is called with the number of characters just done.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    documents, tokens, words = [0, 0], [0, 0], [0, 0]
    paths = [folder / "train.tokens", folder / "val.tokens"]
    with paths[0].open("wb") as train, paths[1].open("wb") as val:
        inside = False
        for text, ends, held_out in split(pieces):
            side = int(held_out)
            ids = encode(tokenizer, text)
            ids = ([] if inside else [bos_id]) + ids + ([eos_id] if ends else [])
            (train, val)[side].write(np.array(ids, dtype=dtype).tobytes())
            tokens[side] += len(ids)
            words[side] += len(text.split())
            documents[side] += ends
            inside = not ends
            progress(len(text))
    if sum(documents) == 1:
        kept = tokens[0] - tokens[0] // HELD_OUT_EVERY
        whole = np.fromfile(paths[0], dtype)
        whole[:kept].tofile(paths[0])
        whole[kept:].tofile(paths[1])
        tokens = [kept, len(whole) - kept]
    return Counts(documents[0], tokens[0], words[0], documents[1], tokens[1])


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a token on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Tokens:
    """A memory-mapped stream of tokens with the ids that frame a document in it."""

    ids: np.ndarray
    bos_id: int
    eos_id: int
    path: Path | None = None
    vocab_size: int = 1 << 32

    @staticmethod
    def open(path: Path, vocab_size: int, bos_id: int, eos_id: int) -> "Tokens":
        dtype = token_dtype(vocab_size)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size % dtype.itemsize:
            raise InputError(f"{path}: damaged, it ends within a token")
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return Tokens(np.empty(0, dtype), bos_id, eos_id)
        return Tokens(np.memmap(path, dtype, mode="r"), bos_id, eos_id, path, vocab_size)

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: np.ndarray, seq_len: int) -> "Batch":
        """Windows of seq_len tokens and the tokens that follow; the stream is taken as a ring."""
        places = starts[:, None] + np.arange(-1, seq_len + 1)
        ids = np.take(self.ids, places, mode="wrap").astype(np.int64)
        if ids.size and ids.max() >= self.vocab_size:
            raise InputError(f"{self.path}: damaged, token {ids.max()} of {self.vocab_size}")
        begins = (ids[:, 1:] == self.bos_id) & (ids[:, :-1] == self.eos_id)  # of a document
        targets = np.where(begins[:, 1:], IGNORED, ids[:, 2:])
        inside = begins[:, :-1].copy()
        inside[:, 0] = False  # the first token's document is number 0
        return Batch(ids[:, 1:-1], targets, inside.cumsum(1).astype(np.int32), begins[:, 0])


@dataclass(frozen=True)
class Batch:
    """Windows for one forward pass."""

    ids: np.ndarray  # (batch, seq_len) int64
    targets: np.ndarray  # (batch, seq_len) int64, the next token, or IGNORED at a document's end
    seq_idx: np.ndarray  # (batch, seq_len) int32, the document of each token
    starts_anew: np.ndarray  # (batch,) bool, whether the first token begins a document

    @property
    def n_targets(self) -> int:
        return int((self.targets != IGNORED).sum())


def training_windows(tokens: Tokens, seq_len: int, batch_size: int, index: int, seed: int) -> Batch:
    """The batch number `index` of a run: a function of its arguments alone, so any run can resume.

    An epoch covers the ring of tokens once, in windows at a random offset, in shuffled order.
    """
    per_epoch = max(1, len(tokens) // seq_len)
    starts = np.empty(batch_size, dtype=np.int64)
    for i in range(batch_size):
        epoch, k = divmod(index * batch_size + i, per_epoch)
        offset, first, stride = _shuffle(seed, epoch, len(tokens), per_epoch)
        starts[i] = offset + (first + k * stride) % per_epoch * seq_len
    return tokens.windows(starts, seq_len)


def _shuffle(seed: int, epoch: int, length: int, count: int) -> tuple[int, int, int]:
    """Offset of an epoch's windows, and a permutation k -> first + k * stride modulo count."""
    random = np.random.default_rng((seed, epoch))
    offset, first = int(random.integers(length)), int(random.integers(count))
    while True:
        stride = int(random.integers(1, count + 1))
        if math.gcd(stride, count) == 1:
            return offset, first, stride


def consecutive_windows(tokens: Tokens, seq_len: int, batch_size: int, index: int) -> Batch:
    """The batch number `index` of a run that carries states: each lane reads on where it was."""
    lanes = np.arange(batch_size) * (len(tokens) // batch_size)
    return tokens.windows(lanes + index * seq_len, seq_len)


def held_out_windows(tokens: Tokens, seq_len: int, batch_size: int, limit: int) -> Iterator[Batch]:
    """The stream cut into windows from its start, at most `limit` tokens of it."""
    length = min(len(tokens), limit)
    starts = np.arange(0, max(length - 1, 0), seq_len)
    for i in range(0, len(starts), batch_size):
        batch = tokens.windows(starts[i : i + batch_size], seq_len)
        # the last window may reach beyond the end, into the ring
        places = starts[i : i + batch_size, None] + np.arange(seq_len)
        batch.targets[places >= length - 1] = IGNORED
        yield batch


def middles(tokens: Tokens, length: int, look: int = 1 << 20) -> list[list[int]]:
    """From the middle of each document long enough, `length` tokens; of the first `look` tokens."""
    ids = np.asarray(tokens.ids[:look])
    begins = np.flatnonzero((ids[1:] == tokens.bos_id) & (ids[:-1] == tokens.eos_id)) + 1
    bounds = [0, *begins.tolist(), len(ids)]
    found = []
    for start, end in pairwise(bounds):
        middle = (start + end) // 2
        if end - start >= 4 * length:
            found.append(ids[middle - length : middle].tolist())
    return found
