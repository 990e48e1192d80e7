"""The Modelfile beside a GGUF file, which `ollama create` reads."""

from pathlib import Path

from ysnake.shared import cli
from ysnake.shared.errors import InputError

MODELFILE = "Modelfile"
WRITTEN_BY_US = "# Written by ysnake.export, which replaces it when it writes here again."


def modelfile(file: Path, parameters: dict[str, float]) -> str:
    """The text that `ollama create -f` reads: plain completion with these default parameters."""
    return "\n".join(
        (
            WRITTEN_BY_US,
            f"FROM ./{file.name}",
            'TEMPLATE "{{ .Prompt }}"',
            'PARAMETER stop "<|endoftext|>"',
            *(f"PARAMETER {name} {value}" for name, value in parameters.items()),
            "",
        )
    )


def check(file: Path) -> Path:
    """The path of the Modelfile beside `file`.

    Raises:
        InputError: writing would replace a file that this command did not write.
    """
    if not file.name:
        raise InputError(f"expected a file to write, got {file}", field="--gguf")
    beside = file.with_name(MODELFILE)
    if file.name.lower() == MODELFILE.lower():
        raise InputError(
            f"{file} is the name of the file that is written beside it", field="--gguf"
        )
    if beside.is_symlink() or (beside.exists() and not _is_ours(beside)):
        raise InputError(
            f"{beside}: exists, and this command did not write it; move it, or export to another "
            "folder"
        )
    return beside


def _is_ours(path: Path) -> bool:
    with cli.writing(path), path.open("rb") as file:
        return file.readline().strip() == WRITTEN_BY_US.encode()
