"""Who may use the server, what half a request can hold up, and how much is logged."""

import contextlib
import logging
import socket
import threading

import pytest
import uvicorn
from starlette.datastructures import Headers

from ysnake.serve import Options
from ysnake.serving import connections, error_log
from ysnake.serving.fields import Refused
from ysnake.serving.guard import Guard, is_local
from ysnake.serving.options import check
from ysnake.shared.errors import InputError

HERE = "127.0.0.1:11435"
OWN = {"Host": HERE, "Origin": f"http://{HERE}", "Sec-Fetch-Site": "same-origin"}
LINK = {"Host": HERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}


def status(options, headers, method="POST", path="/api/generate"):
    """The status that the guard refuses a request with; None lets it pass."""
    try:
        Guard(None, options).check(method, path, Headers(headers))
    except Refused as refused:
        return refused.status
    return None


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Host": HERE}, None),
        ({"Host": "localhost"}, None),
        ({"Host": "LOCALHOST:1"}, None),
        ({"Host": "snake.localhost:80"}, None),
        ({"Host": "[::1]:11435"}, None),
        ({"Host": "127.0.0.2"}, None),
        ({}, 403),
        ({"Host": ""}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "evil.example@localhost"}, 403),
        ({"Host": "localhost:evil"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "192.168.1.5"}, 403),
        (OWN, None),
        (OWN | {"Origin": "http://127.0.0.1:3000"}, 403),
        (OWN | {"Origin": "http://localhost:11435"}, 403),
        (OWN | {"Origin": "https://evil.example"}, 403),
        (OWN | {"Origin": f"http://{HERE}.evil.example"}, 403),
        (OWN | {"Origin": "null"}, 403),
        (OWN | {"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": HERE, "Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": HERE, "Sec-Fetch-Site": "none"}, None),
        (LINK, 403),
    ],
)
def test_a_local_server(headers, refused):
    assert status(Options(), headers) == refused


def test_a_link_opens_the_page_and_nothing_else():
    assert status(Options(), LINK, "GET", "/") is None
    assert status(Options(), LINK, "GET", "/api/tags") == 403


def test_a_server_for_other_machines():
    options = Options(host="0.0.0.0", api_key="k", allow_host=("snake.example",))
    key = {"Authorization": "Bearer k"}
    for host in ("192.168.1.5:80", "[fe80::1]", "snake.example", socket.gethostname(), "localhost"):
        assert status(options, {"Host": host} | key) is None, host
        assert status(options, {"Host": host}) == 401
    assert status(options, {"Host": "evil.example"} | key) == 403


def test_pages_that_are_allowed():
    options = Options(allow_origin=("https://Friend.example/",))
    page = {"Host": HERE, "Sec-Fetch-Site": "cross-site"}
    assert status(options, page | {"Origin": "https://friend.example"}) is None
    assert status(options, page | {"Origin": "http://friend.example"}) == 403
    assert status(Options(allow_origin=("*",)), page | {"Origin": "null"}) is None


@pytest.mark.parametrize("origin", ["friend.example", "https://friend.example/app", "https://"])
def test_origins_that_no_browser_sends(origin):
    with pytest.raises(InputError, match="--allow-origin: expected https://NAME without a path"):
        check(Options(allow_origin=(origin,)))


def test_addresses_of_this_machine():
    assert all(map(is_local, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.5", "snake.local", "")))


@pytest.mark.parametrize(
    "part", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"]
)
def test_a_request_that_is_not_whole_in_time_is_ended(part):
    async def app(scope, receive, send):
        while scope["type"] == "http" and (await receive())["type"] != "http.disconnect":
            pass

    config = uvicorn.Config(
        app, http=connections.protocol(10, whole_within=0.2), lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    with socket.create_connection(listener.getsockname(), timeout=30) as client:
        client.sendall(part)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""
    server.should_exit = True
    thread.join(30)


def test_the_log_of_errors_is_bounded(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    error_log.install()
    for i in range(1000):
        logging.getLogger("any").error("number %d \x1b[2J %s", i, "x" * 20_000)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == error_log.MOST
    assert max(map(len, lines)) == error_log.LONGEST
    assert r"number 0 \x1b[2J" in lines[0]
    for _ in range(1000):
        logging.getLogger("any").warning("a bad request")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == error_log.MOST
    assert "no more warnings are logged" in lines[-1]
    monkeypatch.setattr(error_log, "PERIOD", 0.0)
    logging.getLogger("any").error("later")
    assert "later" in capsys.readouterr().err
