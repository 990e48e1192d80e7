"""The options of `python -m ysnake.serve`, and their checks."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from ysnake.inference.model_options import ModelOptions
from ysnake.shared.errors import InputError
from ysnake.shared.run_files import check_no_model

KEY_VARIABLE = "YSNAKE_API_KEY"
LAST_PORT = 65535


@dataclass
class Options:
    """Serve a trained model: Ollama's API, OpenAI's API, and a web page."""

    model: ModelOptions = field(default_factory=ModelOptions)
    host: str = "127.0.0.1"
    """The address to listen at. 0.0.0.0 or :: lets other machines in, which need a key."""
    port: int = 11435
    """The port to listen at. 0 means any free one."""
    name: str | None = None
    """The model's name for clients; by default that of its run, or of its checkpoint folder."""
    parallel: int = 32
    """Completions that are generated at the same time, in one batch."""
    waiting: int = 96
    """Further requests that may wait. More are refused."""
    remember: int = 32
    """Prompts whose state is kept. A prompt that begins with one of them is read faster."""
    share_prompts: bool = False
    """Let all clients share the kept prompts, and report how many tokens were reused. A client can
    then find out what others have sent. By default each address has prompts of its own."""
    api_key: Annotated[str | None, arg(metavar="KEY")] = None
    """The key that clients must send as `Authorization: Bearer KEY`. It is better set in the
    environment variable YSNAKE_API_KEY, which other users of this machine cannot see."""
    without_key: bool = False
    """Let other machines in without a key."""
    allow_host: Annotated[tuple[str, ...], arg(metavar="NAME...")] = ()
    """Further host names of this machine, for instance behind a proxy."""
    allow_origin: Annotated[tuple[str, ...], arg(metavar="URL...")] = ()
    """Web sites whose pages may use the server, such as https://example.org; * means all."""
    max_tokens: int = 4096
    """Largest number of tokens that a request may ask for."""
    max_prompt: int = 32768
    """Largest number of tokens in a prompt."""
    max_body: int = 1_000_000
    """Largest number of bytes in a request."""
    plain_chat: bool = False
    """Write a chat as a transcript, also where the checkpoint has a chat template."""

    def origins(self) -> list[str]:
        """--allow-origin as browsers write origins: in lower case, without a slash at the end."""
        return [origin.lower().rstrip("/") for origin in self.allow_origin]


def check(options: Options) -> None:
    """Check the options.

    Raises:
        InputError: a value is impossible. `InputError.field` names the option.
    """
    for name in ("parallel", "max_tokens", "max_prompt", "max_body"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise InputError(
                f"expected at least 1, got {getattr(options, name)}", field=f"--{flag}"
            )
    for name in ("waiting", "remember", "port"):
        if getattr(options, name) < 0:
            raise InputError(
                f"expected at least 0, got {getattr(options, name)}", field=f"--{name}"
            )
    if options.port > LAST_PORT:
        raise InputError(f"expected at most {LAST_PORT}, got {options.port}", field="--port")
    key = options.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            "expected ASCII characters without spaces", field=f"--api-key, {KEY_VARIABLE}"
        )
    check_no_model(options.allow_host, "--allow-host")
    for origin in options.origins():
        if origin != "*" and not re.fullmatch(r"https?://[^/?#]+", origin):
            raise InputError(
                f"expected https://NAME without a path, or *, got {origin}", field="--allow-origin"
            )
