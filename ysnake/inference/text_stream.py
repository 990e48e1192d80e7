"""The text of tokens as they are written, up to a stop text."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def texts(tokenizer: "Tokenizer", ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; bytes wait until they make a character."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        if text := stream.step(tokenizer, token):
            yield text


def until(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to where one of `stops` appears; what may be the start of one waits."""
    waiting = ""
    for piece in pieces:
        text, waiting, found = cut(waiting + piece, stops)
        yield text
        if found:
            return
    yield waiting


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """What of a text may be shown, what waits as it may begin a stop text, and if one was found."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    keep = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - keep], text[len(text) - keep :], False
