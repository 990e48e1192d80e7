"""Which text is held out: whole documents among many small ones, passages of long ones."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ysnake.text.documents import Piece, near_space

HELD_OUT_EVERY = 20  # one character in so many is held out
SHORTEST_PASSAGE = 200  # characters; less is not cut from a document
LONGEST_WHOLE = 1 << 16  # characters; no longer document is held out whole


class Part(NamedTuple):
    """A part of a document that belongs to one side of the split."""

    text: str
    ends: bool  # the document ends with it
    held_out: bool
    cut: bool  # a passage was cut off its end, or this is that passage


def split(pieces: Iterable[Piece]) -> Iterator[Part]:
    """Split the pieces: one character in HELD_OUT_EVERY is held out.

    Among many small documents, some are held out whole. A document that is long, in itself or
    compared with the text before it, loses the end of each of its pieces. So no large document is
    held out whole, and later text does not change what is held out.
    """
    read, owed, inside = 0, 0, False  # owed: characters to hold out, times HELD_OUT_EVERY
    for text, ends in pieces:
        size = len(text)
        read += size
        owed += size
        short = ends and not inside and size <= LONGEST_WHOLE
        passage = min(owed // HELD_OUT_EVERY, size // 2)
        if short and size * HELD_OUT_EVERY <= owed:
            yield Part(text, True, True, False)
            owed -= size * HELD_OUT_EVERY
        elif passage >= SHORTEST_PASSAGE and (not short or size * HELD_OUT_EVERY > read):
            at = near_space(text, size - passage)
            yield Part(text[:at], False, False, True)
            yield Part(text[at:], ends, True, True)
            owed -= (size - at) * HELD_OUT_EVERY
        else:
            yield Part(text, ends, False, False)
        inside = not ends
