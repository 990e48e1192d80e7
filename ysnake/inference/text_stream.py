"""The text of tokens as they are written, up to a stop text."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ysnake.text.tokenizer import decode


class TextStream:
    """The text of tokens as they come. Bytes are held back until they form a character."""

    def __init__(self, after: int | None = None):
        """`after` is the token before the first one. Some tokenizers decode a space at the start of
        a text as nothing, and `after` says that this is not the start."""
        self.after = after
        self.stream: DecodeStream | None = None
        self.held: list[int] = []  # tokens since the last text

    def step(self, tokenizer: Tokenizer, token: int) -> str:
        """The new text that a token brings; empty while its character is incomplete."""
        if self.stream is None:
            self.stream = DecodeStream(skip_special_tokens=True)
            if self.after is not None and not self.stream.step(tokenizer, self.after):
                # `after` has no text: a special token, or a part of a character
                self.stream = DecodeStream(skip_special_tokens=True)
        self.held.append(token)
        try:
            text = self.stream.step(tokenizer, token)
        except Exception:  # tokenizers raises no subclass
            # Broken bytes changed how the decoder shows the text before them. So decode the tokens
            # since that text by themselves.
            text = decode(tokenizer, self.held)
            self.stream, self.after = None, token
        if text:
            self.held = []
        return text or ""


def texts(tokenizer: Tokenizer, ids: Iterable[int], after: int | None = None) -> Iterator[str]:
    """The text of tokens as they come, in whole characters. `after` is the token before them."""
    stream = TextStream(after)
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
        (
            n
            for stop in stops
            for n in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:n])
        ),
        default=0,
    )
    return text[: len(text) - keep], text[len(text) - keep :], False
