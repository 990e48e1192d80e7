"""The text of tokens as they are written, up to a stop text."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def texts(tokenizer: "Tokenizer", ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come. Bytes are held back until they form a character."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        if text := stream.step(tokenizer, token):
            yield text


def until(texts: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The texts up to the first of `stops`. What may begin a stop text is held back."""
    waiting = ""
    for new in texts:
        text, waiting, found = cut(waiting + new, stops)
        yield text
        if found:
            return
    yield waiting


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """Split a text at the first stop text.

    Returns the part that may be shown, the end that is held back since it may begin a stop text,
    and whether a stop text was found.
    """
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    keep = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return text[: len(text) - keep], text[len(text) - keep :], False
