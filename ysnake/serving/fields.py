"""Reading the fields of a request. A field of the wrong type is refused by its name."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ysnake.inference.sampling import Sampling
from ysnake.shared.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request

Body = dict[str, Any]
LARGE = 1 << 16  # bytes; only a limited number of larger requests is read at once
MOST_SHOWN = 5  # unknown fields that an error names


class Refused(Exception):
    """A request that is answered with an error. The message says what is wrong with it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code = message, status, code


KINDS = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
KINDS |= {list: "a list", dict: "an object"}


def take(body: Body, name: str, kind: type, default: Any = None) -> Any:
    """Read a field of this type. A field that is null or missing has the default value.

    Raises:
        Refused: it has another type.
    """
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise Refused(f"{name}: expected {KINDS[kind]}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return KINDS[type(value)]
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True)
class Fields:
    """The fields that an object in a request may have. All others are refused by their names."""

    used: set[str]
    """Fields that the server reads."""
    neutral: dict[str, tuple] = field(default_factory=dict)
    """Fields that the server does not support, each with the values that change nothing."""
    ignored: set[str] = field(default_factory=set)
    """Fields that change nothing here, whatever their value."""

    def names(self) -> set[str]:
        """All fields that are known."""
        return self.used | self.neutral.keys() | self.ignored

    def check(self, body: Body) -> None:
        """Refuse unknown fields, and unsupported ones that would change the reply.

        A field that is null counts as missing.
        """
        given = {name: value for name, value in body.items() if value is not None}
        if unknown := sorted(given.keys() - self.names()):
            shown = ", ".join(map(_shown, unknown[:MOST_SHOWN]))
            more = f" and {n} more" if (n := len(unknown) - MOST_SHOWN) > 0 else ""
            raise Refused(f"this server does not know {shown}{more}")
        for name in sorted(given.keys() & self.neutral.keys()):
            if not any(_same(given[name], same) for same in self.neutral[name]):
                raise Refused(f"{name}: this server does not support it, got {_shown(given[name])}")


def _same(value: Any, same: Any) -> bool:
    return value == same and isinstance(value, bool) == isinstance(same, bool)


SAMPLING = {"temperature", "top_k", "top_p", "seed", "stop", "repeat_last_n"}
# the fields of a request, by the options of `ysnake.run` that they stand for
OPTION_FIELDS = {"--temperature": "temperature", "--top-k": "top_k", "--top-p": "top_p"}
OPTION_FIELDS |= {"--seed": "seed"}
SAMPLING_NEUTRAL: dict[str, tuple] = {"min_p": (0,), "typical_p": (1,), "tfs_z": (1,)}
SAMPLING_NEUTRAL |= {"mirostat": (0,), "presence_penalty": (0,), "frequency_penalty": (0,)}
SAMPLING_IGNORED = {"mirostat_tau", "mirostat_eta"}  # without mirostat


def sampling_of(body: Body, penalty: str) -> Sampling:
    """The sampling options in a request. Missing ones have the defaults of `ysnake.run`."""
    default = Sampling()
    seed = take(body, "seed", int, -1)
    if not -1 <= seed < 2**63:
        raise Refused(f"seed: expected at least 0, or -1 for none, got {seed}")
    try:
        sampling = Sampling(
            temperature=float(take(body, "temperature", float, default.temperature)),
            top_k=take(body, "top_k", int, default.top_k),
            top_p=float(take(body, "top_p", float, default.top_p)),
            repetition_penalty=float(take(body, penalty, float, default.repetition_penalty)),
            seed=None if seed == -1 else seed,
        )
    except InputError as error:
        names = OPTION_FIELDS | {"--repetition-penalty": penalty}
        raise Refused(f"{names[error.field]}: {error.reason}") from error
    except OverflowError as error:  # a whole number too large for a float
        raise Refused(f"temperature, top_p, {penalty}: {error}") from error
    last = take(body, "repeat_last_n", int, -1)
    if last != -1 and sampling.repetition_penalty != 1:
        raise Refused(f"repeat_last_n: expected -1, as the penalty is for all tokens, got {last}")
    return sampling


def stops_of(body: Body) -> tuple[str, ...]:
    """The stop texts of a request: one, or a list of at most 16."""
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else take(body, "stop", list)
    if len(stops) > 16 or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
        raise Refused("stop: expected at most 16 texts of 1 to 1000 characters")
    return tuple(stops)


def max_tokens_of(body: Body, name: str, default: int, most: int) -> int:
    """How many tokens a request asks for. -1 and -2 mean as many as allowed."""
    n = take(body, name, int, default)
    if n in (-1, -2):
        return most
    if not 1 <= n <= most:
        raise Refused(f"{name}: expected 1 to {most}, got {n}")
    return n


async def body_of(
    request: "Request", most: int, when_large: Callable[[], Any] = lambda: None
) -> Body:
    """Read the JSON object in a request of at most `most` bytes.

    `when_large` is called once, before more than `LARGE` bytes are kept. It may refuse the request.
    """
    from starlette.requests import ClientDisconnect

    read = bytearray()
    try:
        async for block in request.stream():
            if len(read) <= LARGE < len(read) + len(block):
                when_large()
            read += block
            if len(read) > most:
                raise Refused(f"body: expected at most {most} bytes", 413)
    except ClientDisconnect as error:
        raise Refused("body: the client stopped sending it") from error
    try:
        body = json.loads(read, parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Refused(f"body: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise Refused("body: expected a JSON object")
    return body


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def error_body(path: str, message: str, status: int, code: str | None = None) -> Body:
    """An error in the format of the API at this path."""
    if not path.startswith("/v1/"):
        return {"error": message}
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = (kinds | {500: "server_error"}).get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
