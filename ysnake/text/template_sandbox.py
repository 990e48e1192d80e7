"""Running a chat template, which is a program in a file that may come from anybody.

Jinja's sandbox keeps a template away from Python. It does not limit memory or time. So this module
lets through only what chat templates need, and counts the work: a template may loop over messages
and put texts together. It may not define macros, build lists of lists, or multiply texts.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ysnake.shared.errors import InputError

LONGEST_SOURCE = 1 << 16  # characters of a template
MOST_WORK = 1 << 25  # characters that one run may make, in all its steps
SECONDS = 2.0  # that one run may take

PARTS: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign),
    *(nodes.Const, nodes.Name, nodes.NSRef, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Call, nodes.Keyword, nodes.Filter),
    *(nodes.Test, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Add, nodes.Sub, nodes.Mod, nodes.FloorDiv, nodes.Neg, nodes.Concat),
)
METHODS: dict[type, set[str]] = {
    str: {"strip", "lstrip", "rstrip", "startswith", "endswith", "split", "lower", "upper"},
    dict: {"get", "keys", "values", "items"},
    LoopContext: {"index", "index0", "first", "last", "length", "previtem", "nextitem"},
}
LITERALS = (nodes.List, nodes.Tuple, nodes.Dict)
SCALARS = (str, int, float, type(None), Undefined)


class Work:
    """The work that one run has left."""

    def __init__(self) -> None:
        self.left, self.until = MOST_WORK, time.monotonic() + SECONDS

    def spend(self, amount: int) -> None:
        """Raise SecurityError once a run has done too much."""
        self.left -= amount
        if self.left < 0:
            raise SecurityError(f"makes more than {MOST_WORK:,} characters of text")
        if time.monotonic() > self.until:
            raise SecurityError(f"takes longer than {SECONDS:g} seconds")


_work: ContextVar[Work] = ContextVar("_work")


def compiled(source: str) -> Callable[[dict[str, Any]], str]:
    """A function that renders a template with these variables.

    Both this and the function raise InputError for what is not allowed, too long, or wrong.
    """
    if len(source) > LONGEST_SOURCE:
        raise InputError(f"expected at most {LONGEST_SOURCE:,} characters, got {len(source):,}")
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    environment.filters = {name: _refusing(name) for name in FILTERS} | _FILTERS
    environment.globals = {"namespace": Namespace, "raise_exception": _raise_exception}
    try:
        tree = environment.parse(source)
        for node in tree.find_all(nodes.Node):
            if not isinstance(node, (PARTS, nodes.Helper, nodes.EvalContextModifier)):
                raise SecurityError(f"line {node.lineno}: {type(node).__name__} is not supported")
            if isinstance(node, nodes.For) and node.recursive:
                raise SecurityError(f"line {node.lineno}: a recursive loop is not supported")
        template = environment.from_string(_Counting().visit(tree))
    except Exception as error:  # compiling a foreign program can fail in any way
        raise InputError(_reason(error)) from error

    def render(variables: dict[str, Any]) -> str:
        token = _work.set(Work())
        try:
            pieces = []
            for piece in template.generate(variables):
                _work.get().spend(len(piece))
                pieces.append(piece)
            return "".join(pieces)
        except Exception as error:  # so can running it
            raise InputError(_reason(error)) from error
        finally:
            _work.reset(token)

    return render


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:300]


class _Environment(ImmutableSandboxedEnvironment):
    """Allows methods by their names, functions by identity, and arithmetic of small numbers."""

    intercepted_binops = frozenset(("+", "-", "%", "//"))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return attr in METHODS.get(type(obj), ())

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        method = isinstance(obj, BuiltinMethodType)
        if method and obj.__name__ in METHODS.get(type(obj.__self__), ()):
            _work.get().spend(_size(obj.__self__))
        elif obj is not Namespace and obj is not _raise_exception:
            raise SecurityError(f"a call of {_name(obj)} is not supported")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _work.get().spend(len(left) + len(right))
            return left + right
        if not all(isinstance(side, int) and abs(side) < 1 << 40 for side in (left, right)):
            kinds = f"{_name(left)} {operator} {_name(right)}"
            raise SecurityError(f"expected two texts or two numbers, got {kinds}")
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    """Puts a filter that counts or checks around loops, literals, slices and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _around(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _around(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _around(node, "_sized") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        node.items = [_scalar_item(item) for item in node.items]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if node.ctx == "load":
            node.items = [_scalar_item(item) for item in node.items]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.value = _scalar_item(node.value)
        return node


def _around(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _scalar_item(node: Any) -> nodes.Expr:
    return node if isinstance(node, LITERALS) else _around(node, "_scalar")


def _name(value: Any) -> str:
    if isinstance(value, Undefined):
        return f"{value._undefined_name}, which is not defined,"
    return getattr(value, "__name__", None) or type(value).__name__


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(_scalar(message))[:300])


def _scalar(value: Any) -> Any:
    if not isinstance(value, SCALARS):
        raise SecurityError(f"expected a text or a number, got {_name(value)}")
    return value


def _text(value: Any) -> str:
    text = str(_scalar(value))
    _work.get().spend(len(text))
    return text


@pass_context
def _shown(context: Context, value: Any) -> str:
    return str(_scalar(value))  # its length is counted where it is put out


def _counted(items: Iterable) -> Iterator:
    for item in items:
        _work.get().spend(1)
        yield item


def _sized(value: Any) -> Any:
    _work.get().spend(_size(value))
    return value


def _default(value: Any, instead: Any = "", boolean: bool = False) -> Any:
    return instead if isinstance(value, Undefined) or (boolean and not value) else value


def _refusing(name: str) -> Callable:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise SecurityError(f"the filter {name} is not supported")

    return _filter(refuse)


def _filter(function: Callable) -> Callable:
    """A filter for Jinja, which runs only when the template runs and not when it is compiled."""

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return run


_TEXT_FILTERS: dict[str, Callable[[str], Any]] = {
    "trim": str.strip,
    "upper": str.upper,
    "lower": str.lower,
    "capitalize": str.capitalize,
    "title": str.title,
    "string": str,
}


def _of_text(function: Callable[[str], Any]) -> Callable:
    return _filter(lambda value: function(_text(value)))


_FILTERS = {name: _of_text(function) for name, function in _TEXT_FILTERS.items()} | {
    "length": _filter(len),
    "count": _filter(len),
    "default": _filter(_default),
    "d": _filter(_default),
    "first": _filter(lambda items: items[0]),
    "last": _filter(lambda items: items[-1]),
    "tojson": _filter(lambda value: json.dumps(_text(value), ensure_ascii=False)),
    "_counted": _filter(_counted),
    "_joined": _filter(lambda items: "".join(map(_text, items))),
    "_scalar": _filter(_scalar),
    "_sized": _filter(_sized),
}
