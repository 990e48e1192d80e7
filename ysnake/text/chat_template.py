"""The chat template of a checkpoint: messages as the tokens that the model was trained on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ysnake.shared import manifest
from ysnake.shared.errors import InputError
from ysnake.shared.files import read_json
from ysnake.text.template_sandbox import LONGEST_SOURCE, compiled

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
MOST_SPECIAL = 1024  # special tokens; each is looked for in every message
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode assigns them to no character


class ChatTemplate:
    """A template and the special tokens that its text may contain."""

    def __init__(self, source: str, tokenizer: Tokenizer, named: dict[str, str]):
        """Compile the template.

        Args:
            source: in Jinja's language.
            tokenizer: its special tokens are recognised in the template's text.
            named: the special tokens that the template knows by name, such as `bos_token`.

        Raises:
            InputError: the template is wrong, or does what is not allowed.
        """
        self.run: Callable[[dict[str, Any]], str] = compiled(source)
        self.named = named
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        if len(self.special) > MOST_SPECIAL:
            raise InputError(f"expected at most {MOST_SPECIAL:,} special tokens")
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        self.pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.end_id = self.special.get(named.get("eos_token", ""))  # ends a reply

    def render(self, messages: list[dict[str, str]]) -> list[str | int]:
        """A chat up to where the reply begins: pieces of text, and ids of special tokens.

        What looks like a special token within a message is text.

        Raises:
            InputError: the template refuses these messages, or does too much.
        """
        said = "".join([*self.special, *(message["content"] for message in messages)])
        mark = next((mark for mark in _MARKS if mark not in said), None)
        if mark is None:
            raise InputError("expected text, got every one of U+FDD0 to U+FDEF", field="messages")

        def marked(found: re.Match) -> str:
            return "".join(mark + character for character in found[0])

        marked_messages = [
            message | {"content": re.sub(self.pattern, marked, message["content"])}
            for message in messages
        ]
        variables: dict[str, Any]
        variables = {"messages": marked_messages, "add_generation_prompt": True}
        variables |= {"tools": None, "documents": None, **self.named}
        try:
            text = self.run(variables)
        except InputError as error:
            raise InputError(f"the model's chat template: {error}", field="messages") from error
        pieces = re.split(f"(?<!{mark})({self.pattern})", text)
        texts = [piece.replace(mark, "") for piece in pieces[::2]]
        ids = [self.special[piece] for piece in pieces[1::2]]
        both: list[str | int] = []
        for before, token in zip(texts, ids, strict=False):  # the last text has no token after it
            both += [before, token]
        return [piece for piece in [*both, texts[-1]] if piece != ""]


def load(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, or None if it has none.

    Raises:
        InputError: the template cannot be used. The message names its file.
    """
    found = read(folder)
    if found is None:
        return None
    path, source = found
    try:
        return ChatTemplate(source, tokenizer, _named_tokens(_settings(folder)))
    except InputError as error:
        raise InputError(f"{path}: chat template: {error}") from error


def read(folder: Path) -> tuple[Path, str] | None:
    """The file with the chat template of a checkpoint folder, and the template, if it has one.

    Raises:
        InputError: the file is damaged. The message names it.
    """
    path = folder / FILE
    source: Any
    if path.is_file():
        source = _source(path)
    else:
        settings = _settings(folder)
        path, source = folder / SETTINGS, settings.get("chat_template")
        if isinstance(source, list):  # several, each with a name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InputError(f"{path}: chat_template: expected a text")
    manifest.verify(path)
    return path, source


def kept(folder: Path) -> dict[str, str]:
    """The settings of a checkpoint's tokenizer that further training keeps.

    They are the names of special tokens, and the chat template if there is one.

    Raises:
        InputError: a file is damaged. The message names it.
    """
    if (folder / SETTINGS).is_file():
        manifest.verify(folder / SETTINGS)
    found = read(folder)
    template = {} if found is None else {"chat_template": found[1]}
    return _named_tokens(_settings(folder)) | template


def _settings(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, if it is there."""
    path = folder / SETTINGS
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected an object")
    return settings


def _source(path: Path) -> str:
    if path.stat().st_size > 4 * LONGEST_SOURCE:  # UTF-8 has at most 4 bytes a character
        raise InputError(f"{path}: expected at most {LONGEST_SOURCE:,} characters")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a text ({error})") from error


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens of tokenizer_config.json, where each is a text or an object."""
    named = {}
    for name in NAMED_TOKENS:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            named[name] = text
    return named
