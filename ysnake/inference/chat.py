"""A conversation in the terminal. One context reads each line and each reply, so it remembers all.

The model completes text. So a conversation is one text, with a line break after each reply.
"""

import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ysnake.inference.conversation import complete, read
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context
from ysnake.inference.sampling import Sampling
from ysnake.shared import terminal
from ysnake.shared.errors import InputError
from ysnake.shared.shown import amount

HELP = """\
  an empty line       let the model continue
  /clear              forget the conversation
  /undo               forget the last line and its reply
  /set                show the settings
  /set NAME VALUE     change a setting, for example: /set temperature 0.7
  /save FILE          save what the model remembers
  /load FILE          continue from a saved file
  /help               show this list
  /bye                leave; Ctrl-D does the same
  //TEXT              send /TEXT to the model
Ctrl-C stops a reply."""
MOST_UNDONE = 20  # /undo can take back so many lines


class Chat:
    """A conversation: what the model has read so far, and how it generates replies."""

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
        self.before: list[Context] = []  # the context before each of the last lines

    def new_context(self) -> Context:
        return Context(self.decoder, self.tokenizer.get_vocab_size())

    def talk(self) -> None:
        """Answer each line that the user types, until /bye or the end of the input."""
        with suppress(ImportError):  # not on Windows, whose console does the same
            import readline  # noqa: F401  (gives input() its history and editing)

        print("Type a text; the model continues it. /help lists the commands.", file=sys.stderr)
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
        """Reply to a line, or run the command in it.

        Raises:
            InputError: the command is unknown or failed. The conversation has not changed.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, *values = line[1:].split(maxsplit=2) or [""]
            self.command(name, values, line)
            return
        text = line.removeprefix("/") if line.startswith("//") else line
        if not text and self.context.logits is None:
            return
        before = self.context.copy()
        try:
            if text:
                read(self.context, self.tokenizer, text)
            self.reply()
        except KeyboardInterrupt:
            self.context = before
            print("[stopped; the text is forgotten]", end="", file=sys.stderr)
            raise
        self.before = [*self.before, before][-MOST_UNDONE:]

    def reply(self) -> None:
        """Print the reply while the model generates it, then the speed."""
        began = time.perf_counter()
        how = (self.sampling, self.max_tokens, self.stops)
        self.context, n_tokens, _ = complete(self.context, self.tokenizer, *how)
        seconds = max(time.perf_counter() - began, 1e-9)
        print(f"[{amount(n_tokens, 'token')}, {n_tokens / seconds:.0f} a second]", file=sys.stderr)
        if n_tokens:
            read(self.context, self.tokenizer, "\n")

    def command(self, name: str, values: list[str], line: str) -> None:
        """Run the command NAME of a line "/NAME VALUES"."""
        if name == "help":
            print(HELP, file=sys.stderr)
        elif name == "clear":
            self.context, self.before = self.new_context(), []
            print("the conversation is forgotten", file=sys.stderr)
        elif name == "undo":
            if not self.before:
                raise InputError("/undo: there is nothing to take back")
            self.context = self.before.pop()
            print("the last line and its reply are forgotten", file=sys.stderr)
        elif name == "set" and not values:
            for setting, value in self.settings().items():
                print(f"  {setting} {value}", file=sys.stderr)
        elif name == "set":
            self.set(values[0], " ".join(values[1:]))
            name = values[0].replace("-", "_")
            print(f"{name} is now {self.settings()[name]}", file=sys.stderr)
        elif name in ("save", "load"):
            if not values:
                raise InputError(f"/{name}: expected the name of a file")
            self.to_file(name, Path(line.split(maxsplit=1)[1].strip()))
        else:
            raise InputError(f"/{name}: unknown command; /help lists the commands")

    def settings(self) -> dict[str, object]:
        names = [field.name for field in fields(Sampling)]
        return {"max_tokens": self.max_tokens} | {n: getattr(self.sampling, n) for n in names}

    def set(self, name: str, value: str) -> None:
        """Change a setting.

        Raises:
            InputError: there is no such setting, or it cannot have this value.
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
        """Save the context to a file (`name` is "save"), or load it from one ("load")."""
        if name == "load":
            context = self.new_context()
            context.load(path)
            self.before = [*self.before, self.context][-MOST_UNDONE:]
            self.context = context
            print(f"loaded {path}; /undo returns to the conversation before", file=sys.stderr)
        elif self.context.logits is None:
            raise InputError("/save: the conversation is still empty")
        else:
            self.context.save(path)
            size = path.stat().st_size / 1e6
            print(f"saved to {path} ({size:.1f} MB at any length of text)", file=sys.stderr)
