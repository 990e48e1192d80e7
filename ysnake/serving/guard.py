"""Who may use the server.

A request must name this machine as its host, must not come from a page of another site, and must
carry the key if there is one. A browser says which page a request comes from (`Origin`,
`Sec-Fetch-Site`). Without this check every page that a user opens could use the server, also
through a foreign host name that leads to this machine.
"""

import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from ysnake.serving.fields import Refused, error_body

if TYPE_CHECKING:
    from ysnake.serving.options import Options

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.%]+\]|[^\s:/?#@\[\]\\]+)(:\d+)?")
OPEN = ("/",)  # the page asks for the key itself

App = Callable[[Any, Any, Any], Awaitable[None]]


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware. It answers foreign hosts and pages with 403, a missing key with 401."""

    def __init__(self, app: App, options: "Options"):
        self.app, self.options = app, options
        self.local = is_local(options.host)
        names = {"localhost", options.host, *options.allow_host}
        if not self.local:
            names |= {socket.gethostname(), socket.gethostname() + ".local"}
        self.names = {name.lower() for name in names}
        self.origins = set(options.origins())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope["method"], scope["path"], Headers(scope=scope))
            except Refused as refused:
                body = error_body(scope["path"], refused.message, refused.status, refused.code)
                headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
                return await JSONResponse(body, refused.status, headers)(scope, receive, send)
        await self.app(scope, receive, send)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise Refused unless the request is permitted."""
        host = headers.get("host", "")
        if not self.knows(host):
            raise Refused(f"host {host[:100]!r}: not a name of this machine; see --allow-host", 403)
        self.check_page(method, path, headers, host)
        key = self.options.api_key
        if (
            key is None or path in OPEN or method == "OPTIONS"
        ):  # browsers send OPTIONS without a key
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else ""
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused("api key: expected `Authorization: Bearer KEY`", 401, "invalid_api_key")

    def check_page(self, method: str, path: str, headers: Headers, host: str) -> None:
        """Raise Refused if a page of another site sent the request."""
        origin, site = headers.get("origin", "").lower(), headers.get("sec-fetch-site", "")
        if {origin, "*"} & self.origins:
            return
        if origin and origin.partition("://")[2] != host.lower():
            raise Refused(
                f"origin {origin[:100]!r}: a page of another site; see --allow-origin", 403
            )
        opened = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if site in ("cross-site", "same-site") and not opened:  # a link to the page is harmless
            raise Refused("sec-fetch-site: a page of another site; see --allow-origin", 403)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine."""
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = match["name"].lower().strip("[]")
        if name in self.names or name.endswith(".localhost"):
            return True
        # A foreign name can be made to lead to this machine; an address cannot.
        return _is_address(name) and (not self.local or ipaddress.ip_address(name).is_loopback)
