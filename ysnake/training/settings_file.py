"""Settings from a file: TOML with the names of the options, or the settings.json of a run."""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ysnake.shared.errors import InputError, why
from ysnake.shared.field_types import from_plain, is_a, name_of
from ysnake.shared.files import read_json
from ysnake.shared.terminal import not_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


OTHER_NAMES = {"from": "from_", "learning_rate": "lr"}


def read(path: Path) -> dict[str, Any]:
    """The content of a file of settings, whatever names and values it has."""
    if path.suffix == ".json":
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected an object with settings")
        return values
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_text(str(path), error.start, "utf-8") from error
    except OSError as error:
        raise InputError(f"{path}: {why(error)}", field="--config") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML ({error})", field="--config") from error


def checked(values: Mapping[str, Any], kinds: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings by the names of the dataclass, with paths and tuples in place of text and lists.

    Args:
        values: by the name of an option, with - or _ between words.
        kinds: the type of each setting.
        source: where the values come from, for error messages.

    Raises:
        InputError: a name is unknown, or a value has a wrong type.
    """
    plain = {name.replace("-", "_"): value for name, value in values.items()}
    named = {OTHER_NAMES.get(name, name): value for name, value in plain.items()}
    if unknown := sorted(named.keys() - kinds.keys()):
        close = get_close_matches(unknown[0], kinds, 1)
        hint = f"did you mean {close[0].rstrip('_')}? " if close else ""
        raise InputError(
            f"{source}: unknown settings: {', '.join(unknown)}; {hint}ysnake train --help lists all"
        )
    found = {name: from_plain(kinds[name], value) for name, value in named.items()}
    for name, value in found.items():
        if not is_a(kinds[name], value):
            shown = f"{name.rstrip('_')}: expected {name_of(kinds[name])}, got {value!r}"
            raise InputError(f"{source}: {shown}"[:300])
    return found
