"""The options of `python -m ysnake.serve`, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ysnake.shared.errors import InputError

KEY_VARIABLE = "YSNAKE_API_KEY"


@dataclass
class Options:
    """Serve a trained model: Ollama's API, OpenAI's completions, and a page to type into."""

    path: Positional[Annotated[Path | None, arg(metavar="PATH")]] = None
    """A run or a checkpoint folder; by default the newest run."""
    checkpoint: Literal["best", "last"] | None = None
    """Which checkpoint of a run; by default best where patience ended it, else last."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 or :: lets other machines in, which need a key."""
    port: int = 11435
    """The port to listen at; 0 takes a free one."""
    name: str | None = None
    """What clients call the model; by default the name of its folder."""
    parallel: int = 32
    """Completions written at once, in one batch."""
    waiting: int = 96
    """Further requests that may wait for their turn; more are refused."""
    remember: int = 32
    """Prompts whose state is kept, so that what begins with one is not read again."""
    share_prompts: bool = False
    """Read a prompt on from what any client has sent, and count those tokens in replies. A client
    can then find out what others have sent. By default each address has its own."""
    api_key: Annotated[str | None, arg(metavar="KEY")] = None
    """What clients must send as `Authorization: Bearer KEY`; by default YSNAKE_API_KEY, a variable
    that other users of this machine cannot see."""
    without_key: bool = False
    """Let other machines in without a key."""
    allow_host: Annotated[tuple[str, ...], arg(metavar="NAME...")] = ()
    """Further names by which clients may reach this machine, as behind a proxy."""
    allow_origin: Annotated[tuple[str, ...], arg(metavar="URL...")] = ()
    """Sites whose pages may use the server, such as https://example.org; * means all."""
    max_tokens: int = 4096
    """Tokens that one request may ask for."""
    max_prompt: int = 32768
    """Tokens that a prompt may have."""
    max_body: int = 1_000_000
    """Bytes that a request may have."""
    weights: Literal["float32", "int8"] = "float32"
    """int8 writes faster on a CPU, and nearly the same."""
    compile: bool = False
    """Write faster on a CPU, for some seconds at the start: torch.compile, with a C++ compiler."""
    device: str = "auto"
    """auto (CUDA, else CPU), cpu, cuda or mps."""
    threads: int | None = None
    """Threads on the CPU; by default one for each core."""


def check(options: Options) -> None:
    """See that the options can work.

    Raises:
        InputError: one cannot, named.
    """
    for name in ("parallel", "max_tokens", "max_prompt", "max_body"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected at least 1, got {getattr(options, name)}")
    for name in ("waiting", "remember", "port"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}: expected at least 0, got {getattr(options, name)}")
    key = options.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"--api-key, {KEY_VARIABLE}: expected ASCII characters without spaces")
    for origin in options.allow_origin:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise InputError(f"--allow-origin: expected https://NAME or *, got {origin}")
