"""From documents to training windows: tokens on disk, and windows of them.

A corpus is never in memory as a whole: documents come in pieces, and tokens are memory-mapped. On
disk a document is bos + text + eos, so a document starts exactly where a bos follows an eos.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ysnake.model.config import IGNORED
from ysnake.shared.errors import InputError
from ysnake.shared.shown import amount
from ysnake.text.documents import Corpus, Piece, find_files, open_corpus, read_file
from ysnake.text.held_out import Part, split
from ysnake.text.tokenizer import dropped_bytes, encode

# from here, too
__all__ = ["Corpus", "Part", "Piece", "find_files", "open_corpus", "read_file", "split"]

SEARCHED = 1 << 20  # tokens among which prompts are looked for


@dataclass
class Counts:
    """How much was written: documents, tokens and words on both sides of the split."""

    train_documents: int = 0  # whole or in part
    train_tokens: int = 0
    train_words: int = 0
    val_documents: int = 0  # whole
    val_cut: int = 0  # documents from which passages are cut
    val_tokens: int = 0
    bytes: int = 0
    dropped: int = 0  # bytes of characters that the tokenizer does not know
    val_bytes: int = 0
    val_dropped: int = 0

    def lines(self) -> list[str]:
        """The counts as lines for the user."""
        parts = [f"parts of {self.val_cut:,}"] if self.val_cut else []
        if self.val_documents or not parts:
            parts.insert(0, f"{self.val_documents:,}")
        share = self.val_tokens / max(1, self.val_tokens + self.train_tokens)
        learnt = f"{amount(self.train_words, 'word')}, {amount(self.train_tokens, 'token')}"
        lines = [
            f"{amount(self.train_documents, 'document')} to train on ({learnt}), "
            f"{' and '.join(parts)} held out ({amount(self.val_tokens, 'token')}, {share:.1%})"
        ]
        if not self.val_tokens:
            lines.append(
                "too little text to hold any out: there will be no held-out loss, no best/ and "
                "nothing for --patience to watch"
            )
        if self.dropped:
            lines.append(
                "left out: characters that the tokenizer does not know: "
                f"{amount(self.dropped, 'byte')} ({self.dropped / self.bytes:.1%})"
            )
        return lines


def write_tokens(
    pieces: Iterable[Piece],
    tokenizer: Tokenizer,
    bos_id: int,
    eos_id: int,
    folder: Path,
    progress: Callable[[int], None],
) -> Counts:
    """Write the tokens of documents to `folder`/train.tokens and val.tokens, split by `split`.

    `progress` is called with the number of characters just done.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    counts = Counts()
    with (folder / "train.tokens").open("wb") as train, (folder / "val.tokens").open("wb") as val:
        inside = losing = False
        for text, ends, held_out, cut in split(pieces):
            ids = encode(tokenizer, text)
            n_bytes = len(text.encode("utf-8", "replace"))
            dropped = dropped_bytes(tokenizer, text, ids)
            counts.dropped += dropped
            counts.bytes += n_bytes
            closed = ends or cut
            ids = ([] if inside else [bos_id]) + ids + ([eos_id] if closed else [])
            (val if held_out else train).write(np.array(ids, dtype=dtype).tobytes())
            if held_out:
                counts.val_bytes += n_bytes
                counts.val_dropped += dropped
                counts.val_tokens += len(ids)
                counts.val_documents += not cut
            else:
                counts.train_tokens += len(ids)
                counts.train_words += len(text.split())
            losing |= cut
            if ends:
                counts.train_documents += losing or not held_out
                counts.val_cut += losing
                losing = False
            inside = not closed
            progress(len(text))
    return counts


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of a token on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Tokens:
    """A memory-mapped stream of tokens, and the ids that begin and end a document in it."""

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
        """Windows of seq_len tokens and their next tokens. The stream continues at its start."""
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
    def predicted(self) -> np.ndarray:
        """The targets that count, one after the other."""
        return self.targets[self.targets != IGNORED]

    @property
    def n_targets(self) -> int:
        return len(self.predicted)


def training_windows(tokens: Tokens, seq_len: int, batch_size: int, index: int, seed: int) -> Batch:
    """The batch number `index` of a run. It depends on the arguments alone, so a run can resume.

    An epoch covers all tokens once, in windows at a random offset and in shuffled order.
    """
    per_epoch = max(1, len(tokens) // seq_len)
    starts = np.empty(batch_size, dtype=np.int64)
    for i in range(batch_size):
        epoch, k = divmod(index * batch_size + i, per_epoch)
        offset, order = _shuffle(seed, epoch, len(tokens), per_epoch)
        starts[i] = offset + int(order[k]) * seq_len
    return tokens.windows(starts, seq_len)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def _shuffle(seed: int, epoch: int, length: int, count: int) -> tuple[int, np.ndarray]:
    """The offset of an epoch's windows, and their order. The order takes 8 bytes a window."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(length)), random.permutation(count)


def consecutive_windows(tokens: Tokens, seq_len: int, batch_size: int, index: int) -> Batch:
    """The batch number `index` of a run that carries states: each row continues its last window."""
    lanes = np.arange(batch_size) * (len(tokens) // batch_size)
    return tokens.windows(lanes + index * seq_len, seq_len)


def held_out_windows(tokens: Tokens, seq_len: int, batch_size: int, limit: int) -> Iterator[Batch]:
    """All tokens, cut into windows. If they are more than `limit`, only about `limit` of them.

    Those windows lie at equal distances, so that they come from all documents.
    """
    length = len(tokens)
    starts = np.arange(0, max(length - 1, 0), seq_len)
    if length > limit:
        most = max(1, limit // seq_len)
        starts = starts[np.arange(most) * len(starts) // most]
    for i in range(0, len(starts), batch_size):
        batch = tokens.windows(starts[i : i + batch_size], seq_len)
        # the last window may reach beyond the end, to the start of the stream
        places = starts[i : i + batch_size, None] + np.arange(seq_len)
        batch.targets[places >= length - 1] = IGNORED
        yield batch


def middles(tokens: Tokens, length: int) -> list[list[int]]:
    """`length` tokens from the middle of each document that is long enough.

    Only the first SEARCHED tokens are searched.
    """
    ids = np.asarray(tokens.ids[:SEARCHED])
    begins = np.flatnonzero((ids[1:] == tokens.bos_id) & (ids[:-1] == tokens.eos_id)) + 1
    bounds = [0, *begins.tolist(), len(ids)]
    found = []
    for start, end in pairwise(bounds):
        middle = (start + end) // 2
        if end - start >= 4 * length:
            found.append(ids[middle - length : middle].tolist())
    return found
