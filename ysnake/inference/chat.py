"""A conversation that remembers: one context, to which each line and each reply is added.

The model completes text. So a conversation is one text, with a line break after each reply.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ysnake.inference.conversation import read
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context
from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import texts, until
from ysnake.shared import terminal
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls

HELP = """\
  an empty line       the model goes on
  /clear              forget all that was said
  /undo               forget the last line and its reply
  /set                show the settings
  /set NAME VALUE     change one, for example: /set temperature 0.7
  /save FILE          write what the model remembers to a file
  /load FILE          go on from such a file
  /help               this list
  /bye                leave (Ctrl-D does, too)
  //...               a line that begins with one slash
Ctrl-C ends a reply."""
MOST_UNDONE = 20  # lines that /undo can take back


class Chat:
    """What the model remembers, and how it writes."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_tokens: int,
        stops: tuple[str, ...],
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self.sampling, self.max_tokens, self.stops = sampling, max_tokens, stops
        self.context = self.new_context()
        self.before: list[Context] = []  # as it was before each of the last lines

    def new_context(self) -> Context:
        return Context(self.decoder, self.tokenizer.get_vocab_size())

    def talk(self) -> None:
        """Answer what is typed until the end of input or /bye."""
        with suppress(ImportError):  # not on Windows, whose console does the same
            import readline  # noqa: F401  (gives input() its history and editing)

        print("Type a text for the model to go on with. /help lists the commands.", file=sys.stderr)
        while True:
            try:
                line = terminal.ask("> ")
                if line.split()[:1] == ["/bye"]:
                    return
                self.answer(line)
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)

    def answer(self, line: str) -> None:
        """Do what a line asks for.

        Raises:
            InputError: a command that is not known, or that cannot be done. Nothing has changed.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, *values = line[1:].split(maxsplit=2) or [""]
            self.command(name, values)
            return
        text = line.removeprefix("/") if line.startswith("//") else line
        if not text and self.context.logits is None:
            return
        before = self.context.copy()
        if text:
            read(self.context, self.tokenizer, text)
        self.before = [*self.before, before][-MOST_UNDONE:]
        self.reply()

    def reply(self) -> None:
        """Print what the model writes as it comes, then how fast it came."""
        written = 0

        def counted() -> Iterator[int]:
            nonlocal written
            for token in self.context.generate(self.sampling, self.max_tokens):
                written += 1
                yield token

        began = time.perf_counter()
        try:
            for text in until(texts(self.tokenizer, counted()), self.stops):
                print(escape_controls(text, keep="\n\t"), end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        seconds = max(time.perf_counter() - began, 1e-9)
        print(flush=True)
        print(f"[{written} tokens, {written / seconds:.0f} a second]", file=sys.stderr)
        if written:
            read(self.context, self.tokenizer, "\n")

    def command(self, name: str, values: list[str]) -> None:
        """Run a command that is typed after a slash."""
        if name == "help":
            print(HELP, file=sys.stderr)
        elif name == "clear":
            self.context, self.before = self.new_context(), []
        elif name == "undo":
            if not self.before:
                raise InputError("/undo: there is no line to take back")
            self.context = self.before.pop()
        elif name == "set" and not values:
            for setting, value in self.settings().items():
                print(f"  {setting} {value}", file=sys.stderr)
        elif name == "set":
            self.set(values[0], " ".join(values[1:]))
        elif name in ("save", "load"):
            if len(values) != 1:
                raise InputError(f"/{name}: expected the name of a file")
            self.to_file(name, Path(values[0]))
        else:
            raise InputError(f"/{name}: not a command; /help lists them")

    def settings(self) -> dict[str, object]:
        names = [field.name for field in fields(Sampling)]
        return {"max_tokens": self.max_tokens} | {n: getattr(self.sampling, n) for n in names}

    def set(self, name: str, value: str) -> None:
        """Change a setting.

        Raises:
            InputError: no such setting, or not a value that it can have.
        """
        name = name.replace("-", "_")
        known = self.settings()
        if name not in known:
            raise InputError(f"/set: expected one of {', '.join(known)}, got {name}")
        usual = {field.name: field.default for field in fields(Sampling)}
        kind = float if isinstance(usual.get(name), float) else int
        try:
            number = kind(value)
        except ValueError:
            what = "a number" if kind is float else "a whole number"
            raise InputError(f"/set {name}: expected {what}, got {value or 'nothing'}") from None
        if name != "max_tokens":
            change: Any = {name: number}
            self.sampling = replace(self.sampling, **change)
        elif number < 1:
            raise InputError(f"/set max_tokens: expected at least 1, got {number}")
        else:
            self.max_tokens = int(number)

    def to_file(self, name: str, path: Path) -> None:
        """Write what the model remembers, or read it."""
        if name == "load":
            context = self.new_context()
            context.load(path)
            self.before = [*self.before, self.context][-MOST_UNDONE:]
            self.context = context
        elif self.context.logits is None:
            raise InputError("/save: nothing has been said yet")
        else:
            self.context.save(path)
            size = path.stat().st_size / 1e6
            print(f"{path}: {size:.1f} MB, whatever the length of the text", file=sys.stderr)
