"""Values for the fields of a dataclass that come from a file or from Python, not from options."""

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def is_a(kind: Any, value: Any) -> bool:
    """Whether a value has the type of a field."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(is_a(each, value) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_a(get_args(kind)[0], v) for v in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def name_of(kind: Any) -> str:
    """The type of a field in words."""
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]  # the other is None
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list of {'paths' if Path in get_args(kind) else 'texts'}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(kind, "a path")


def from_plain(kind: Any, value: Any) -> Any:
    """A value as the field wants it: paths from text, and a tuple from a list or a single path."""
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(from_plain(get_args(kind)[0], each) for each in values)
    is_path = kind is Path or (get_origin(kind) in (Union, UnionType) and Path in get_args(kind))
    return Path(value) if is_path and isinstance(value, str) else value
