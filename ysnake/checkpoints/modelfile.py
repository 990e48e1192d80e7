"""The Modelfile beside a GGUF file, which `ollama create` reads."""

import hashlib
import json
from pathlib import Path

from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.shared.files import check_place

MODELFILE = "Modelfile"
WRITTEN_BY_US = "# Written by ysnake.export. It replaces this file only if nobody has changed it."
HASH = "# SHA-256 of the lines below: "


def modelfile(file: Path, parameters: dict[str, float], stops: list[str], chats: bool) -> str:
    """The text that `ollama create -f` reads.

    Args:
        file: the GGUF file.
        parameters: defaults of how text is drawn.
        stops: tokens that end a text.
        chats: whether the GGUF file has a chat template. Without one, Ollama completes plain text.
    """
    lines = [f"FROM ./{file.name}"]
    if not chats:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    text = "\n".join([*lines, ""])
    return "\n".join((WRITTEN_BY_US, HASH + _sha256(text), text))


def check(file: Path) -> Path:
    """The path of the Modelfile beside `file`.

    Raises:
        InputError: there is no folder to write to, or writing would replace a file that this
            command did not write or that was changed.
    """
    check_place(file, "--gguf")
    beside = file.with_name(MODELFILE)
    if file.name.lower() == MODELFILE.lower():
        raise InputError(
            f"{file}: choose another name; the export also writes a file called {MODELFILE} there",
            field="--gguf",
        )
    if beside.is_symlink() or (beside.exists() and not _is_ours(beside)):
        raise InputError(
            f"{beside}: exists, and was written or changed by someone else; move it, or export to "
            "another folder"
        )
    return beside


def _is_ours(path: Path) -> bool:
    with cli.file_errors(path):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    mark, _, text = text.partition("\n")
    line, _, text = text.partition("\n")
    return mark == WRITTEN_BY_US and line == HASH + _sha256(text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
