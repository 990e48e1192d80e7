"""The server as its clients meet it: real processes, real sockets, the real `ollama` client."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import ollama
import pytest
from running_server import NAME, options, serving
from small import entry, environment, saved

from ysnake import run, serve
from ysnake.serving import chat
from ysnake.shared.shown import escape_controls


def test_the_ollama_client_generates(client, served):
    whole = client.generate(NAME, "The adder", options=options())
    assert whole.done
    assert whole.done_reason == "length"
    assert whole.eval_count == 12
    parts = list(client.generate(NAME, "The adder", stream=True, options=options()))
    assert "".join(part.response for part in parts) == whole.response
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    settings = ("--seed", "3", "--max-tokens", "12", "--weights", "float32")
    _, printed, _ = entry(run.main, served, "--prompt", "The adder", *settings)
    assert printed == escape_controls(whole.response, keep="\n\t") + "\n"


def test_the_ollama_client_chats(client):
    """A base model reads a transcript. Its reply ends where it would write for the user."""
    messages = [{"role": "user", "content": "The boa"}]
    reply = client.chat(NAME, messages, options=options())
    assert reply.message.role == "assistant"
    written = client.generate(NAME, "User: The boa\nAssistant:", options=options())
    assert reply.message.content == written.response.lstrip()
    messages = [{"role": "system", "content": "Snakes."}, *messages, dict(reply.message)]
    messages += [{"role": "user", "content": "And the krait"}]
    text = f"Snakes.\n\nUser: The boa\nAssistant: {reply.message.content}\n"
    text += "User: And the krait\nAssistant:"
    parts = list(client.chat(NAME, messages, stream=True, options=options()))
    written = client.generate(NAME, text, options=options(stop=chat.STOP)).response.lstrip()
    assert "".join(part.message.content for part in parts) == written


def test_a_reply_that_is_begun_is_continued(client):
    messages = [{"role": "user", "content": "The boa"}, {"role": "assistant", "content": "sleeps"}]
    reply = client.chat(NAME, messages, options=options()).message.content
    text = "User: The boa\nAssistant: sleeps"
    assert reply == client.generate(NAME, text, options=options(stop=chat.STOP)).response


def test_the_ollama_client_lists_and_shows_the_model(client, address):
    (listed,) = client.list().models
    assert listed.model == f"{NAME}:latest"
    assert listed.details.family == "mamba2"
    assert client.ps().models[0].digest == listed.digest
    shown = client.show(NAME)
    assert shown.capabilities == ["completion", "embedding"]
    assert shown.modelinfo["mamba2.block_count"] == 2
    assert client.generate(f"{NAME}:latest", "").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="model 'bear' not found") as caught:
        client.generate("bear", "x")
    assert caught.value.status_code == 404
    assert httpx.get(f"{address}/api/version").json()["version"]


def test_stop_texts_end_a_completion(client):
    full = client.generate(NAME, "The", options=options(num_predict=60)).response
    stop = full[20:23]
    cut = client.generate(NAME, "The", options=options(num_predict=60, stop=["nowhere", stop]))
    assert cut.response == full[: full.index(stop)]
    assert cut.done_reason == "stop"


def test_32_clients_stream_at_once(address):
    async def ask(number):
        async with ollama.AsyncClient(address) as client:
            how = {"seed": number, "num_predict": 10 + number, "temperature": 0.1 * (number % 9)}
            parts = await client.generate(NAME, "The" * number + " x", stream=True, options=how)
            return "".join([part.response async for part in parts])

    async def together():
        return await asyncio.gather(*(ask(number) for number in range(32)))

    async def alone():
        return [await ask(number) for number in range(0, 32, 5)]

    assert asyncio.run(together())[::5] == asyncio.run(alone())


# ------------------------------------------------------------------ wrong requests

WRONG = {  # values that are not of a kind
    str: [0, 1.5, True, [], {}, ["x"]],
    bool: [0, 1, "yes", [], {}],
    int: ["1", 1.5, True, [], {}],
    float: ["1", False, [0.5], {}],
    dict: [1, "x", [], True],
    list: [1, "x", {}, True],
}
COMMON = {
    "temperature": (float, [-1, -1e-9]),
    "top_p": (float, [0, -1, 1.01]),
    "seed": (int, [-2, 2**63, 10**30]),
    "stop": (list, [[""], ["x"] * 17, [1], [None], ["x" * 2000]]),
}
COMMON["stop"][1].append("")
OPTIONS = COMMON | {
    "top_k": (int, [-1]),
    "repeat_penalty": (float, [0, -1]),
    "num_predict": (int, [0, -3, 10**9, 10**40]),
    "mirostat": (int, [1]),
}
BODY = {"model": (str, ["", "bear", "snake:7b", "\ud800"]), "stream": (bool, [])}
OLLAMA = BODY | {"options": (dict, []), "format": (str, ["json", {"type": "object"}])}
SCHEMA = {
    "/api/generate": OLLAMA | {"prompt": (str, []), "system": (str, []), "suffix": (str, ["x"])},
    "/api/chat": OLLAMA | {"messages": (list, [[1], [{}], [{"role": "king"}], [{"role": 1}]])},
    "/api/show": {"model": BODY["model"]},
    "/v1/completions": BODY
    | COMMON
    | {"prompt": (str, [["a", "b"], None]), "max_tokens": (int, [0, 10**9]), "n": (int, [2])},
    "/v1/chat/completions": BODY
    | COMMON
    | {"messages": (list, [[], [1], [{}]]), "max_completion_tokens": (int, [0, 10**9])},
    "/v1/embeddings": {"model": BODY["model"], "input": (list, [[], [1], None])},
    "/api/embed": {
        "model": BODY["model"],
        "input": (list, [[], [[]], None]),
        "options": (dict, []),
    },
}
VALID = {
    "/api/generate": {"model": NAME, "prompt": "x", "options": {"num_predict": 1}},
    "/api/chat": {"model": NAME, "messages": [{"role": "user", "content": "x"}]},
    "/api/show": {"model": NAME},
    "/v1/completions": {"model": NAME, "prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "x"}]},
    "/v1/embeddings": {"model": NAME, "input": "x"},
    "/api/embed": {"model": NAME, "input": "x"},
}


def malformed(draw):
    """The method, path and content of a request that is wrong in one way."""
    path = draw.choice(list(SCHEMA))
    body = json.loads(json.dumps(VALID[path]))
    way = draw.randrange(10)
    if way == 0:  # broken JSON
        content = json.dumps(body).encode()
        return "POST", path, content[: draw.randrange(len(content))]
    if way == 1:  # not an object, or not text
        odd = [b"", b"[]", b"null", b"1e999", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}']
        odd += [b'{"a":' * 5000, b'{"model": "snake", "prompt": "x", "options": {"seed": 1e400}}']
        odd += [b'{"seed": ' + b"9" * 5000 + b"}"]
        return "POST", path, draw.choice(odd)
    if way == 2:  # wrong method or path
        wrong = [("GET", path), ("DELETE", path), ("POST", path + "/x"), ("POST", "/api/tags")]
        return *draw.choice([*wrong, ("GET", "/v1/models/bear"), ("PUT", "/")]), json.dumps(body)
    schema, target = SCHEMA[path], body
    if "options" in schema and draw.random() < 0.5:
        schema, target = OPTIONS, body.setdefault("options", {})
    name = draw.choice(list(schema))
    kind, out_of_range = schema[name]
    bad = [value for value in WRONG[kind] if value not in ([], "x", ["x"]) or name != "stop"]
    if name in ("format", "suffix"):
        bad = [1, True, ["x"]]
    if name == "prompt" and path == "/v1/completions":
        bad = [0, 1.5, True, [], {}, [1]]
    if name == "input":
        bad = [0, 1.5, True, {}, [None]]
    target[name] = draw.choice([*bad, *out_of_range])
    return "POST", path, json.dumps(body)


def test_malformed_requests_are_refused_and_the_server_lives(address):
    draw = random.Random(0)
    with httpx.Client(base_url=address) as http:
        for _ in range(200):
            method, path, content = malformed(draw)
            response = http.request(method, path, content=content)
            exchange = f"{method} {path} {content[:200]!r}: {response.status_code} {response.text}"
            assert 400 <= response.status_code < 500, exchange
            error = response.json()["error"]
            if path.startswith("/v1"):
                assert isinstance(error.pop("message"), str), exchange
                assert set(error) == {"type", "param", "code"}, exchange
            else:
                assert isinstance(error, str), exchange
        assert http.post("/api/generate", json=VALID["/api/generate"]).status_code == 200


def test_a_page_from_elsewhere_cannot_reach_a_local_server(address):
    def ask(**headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        content = json.dumps(VALID["/api/generate"])  # as text/plain, which needs no preflight
        return httpx.post(f"{address}/api/generate", content=content, headers=headers)

    for strange in (
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    ):
        answer = ask(**strange)
        assert answer.status_code == 403, strange
        assert isinstance(answer.json()["error"], str)
    port = address.rsplit(":", 1)[1]
    for own in ({}, {"Origin": address}, {"Host": f"localhost:{port}"}):
        assert ask(**own).status_code == 200, own


@pytest.mark.parametrize(
    "unknown", [{"min_p": 0.5}, {"typical_p": 0.5}, {"mirostat": 2}, {"presence_penalty": 1}]
)
def test_unsupported_and_unknown_fields_are_refused(address, unknown):
    for path, body in VALID.items():
        if path == "/api/show":
            continue  # it has no options
        options = body.get("options", {})
        wrong = body | ({"options": options | unknown} if path.startswith("/api") else unknown)
        for content in (wrong, body | {"no_such_field": 1}):
            answer = httpx.post(address + path, json=content)
            assert answer.status_code == 400, (path, content)
            assert next(iter(unknown)) in answer.text or "no_such_field" in answer.text


def test_the_penalty_is_for_all_tokens(address):
    def ask(**settings):
        settings = {"num_predict": 1, **settings}
        body = {"model": NAME, "prompt": "x", "options": settings}
        return httpx.post(f"{address}/api/generate", json=body)

    assert ask(repeat_last_n=0, repeat_penalty=1.5).status_code == 400
    assert ask(repeat_last_n=-1, repeat_penalty=1.5).status_code == 200
    assert ask(repeat_last_n=64).status_code == 200


# ------------------------------------------------------------------ strangers


def descriptors(count):
    """What a process does before it starts, to have so many file descriptors at most."""
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server at IPv6's own address, with a key, few descriptors and weights to play with."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    folder = saved(tmp_path_factory.mktemp("guarded"))
    options = ["--host", "::1", "--api-key", "secret", "--share-prompts"]
    options += ["--allow-origin", "https://Friend.example/"]
    with serving(folder, *options, preexec_fn=descriptors(256)) as (address, process):
        yield folder, address, process


KEY = {"Authorization": "Bearer secret"}


def test_the_key_is_asked_for(guarded):
    _, address, _ = guarded
    assert httpx.get(address).status_code == 200  # the page, which asks for the key
    for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret\xff"}):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with ollama.Client(address, headers=KEY) as client:
        assert client.generate(NAME, "The", options=options(num_predict=2)).eval_count == 2


def test_a_page_that_is_allowed(guarded):
    _, address, _ = guarded
    friend = {"Origin": "https://friend.example"}
    asked = friend | {"Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "authorization"}
    answer = httpx.options(f"{address}/api/generate", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == friend["Origin"]
    assert httpx.get(f"{address}/api/tags", headers=friend | KEY).status_code == 200
    answer = httpx.get(f"{address}/api/tags", headers=friend)
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == friend["Origin"]  # the page can read it
    other = {"Origin": "https://other.example"}
    assert httpx.get(f"{address}/api/tags", headers=other | KEY).status_code == 403


def test_cached_tokens_are_counted_where_the_operator_asks(guarded):
    _, address, _ = guarded
    body = {"model": NAME, "prompt": "The boa and the krait", "max_tokens": 1}
    for _ in range(2):
        usage = httpx.post(f"{address}/v1/completions", json=body, headers=KEY).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_half_sent_requests_leave_room_for_others(guarded):
    _, address, process = guarded
    port = int(address.rsplit(":", 1)[1])
    half = []
    try:
        for i in range(300):
            half.append(socket.create_connection(("::1", port)))
            half[-1].sendall(b"POST /api/generate HTTP/1.1\r\nHost: [::1]\r\nContent-Le")
            if i % 60 == 0:
                assert httpx.get(f"{address}/api/tags", headers=KEY).status_code == 200
    finally:
        for connection in half:
            connection.close()
    assert process.poll() is None


def test_weights_that_change_under_the_server(guarded):
    """The file is cut short, as `cp` does: a process that has it mapped ends with SIGBUS."""
    folder, address, process = guarded
    os.truncate(folder / "model.safetensors", 1000)
    with ollama.Client(address, headers=KEY) as client:
        assert client.generate(NAME, "A new prompt", options=options()).eval_count == 12
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_other_machines_need_a_key(served):
    code, _, errors = entry(serve.main, served, "--host", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "--api-key: --host 0.0.0.0 lets other machines connect, so a key is needed" in errors


# ------------------------------------------------------------------ limits, places, memory


def test_limits_clients_that_leave_and_shutdown(tmp_path):
    folder = saved(tmp_path, eos_id=-1)  # a model that never ends by itself
    limits = ("--parallel", "1", "--waiting", "1", "--max-tokens", "1000000")
    with serving(folder, *limits, "--max-prompt", "20", "--max-body", "2000") as (address, process):
        long = {"model": NAME, "prompt": "x", "options": {"num_predict": 1_000_000}}
        short = long | {"options": {"num_predict": 2}, "stream": False}

        def post(body, path="/api/generate"):
            return httpx.post(address + path, json=body, timeout=60)

        refused = post(short | {"prompt": "word " * 100})
        assert refused.status_code == 400
        assert re.search(
            "The text is too long: expected at most 20 tokens, got [0-9]+", refused.json()["error"]
        )
        refused = post(short | {"prompt": "x" * 3000})
        assert (refused.status_code, "2000 bytes" in refused.json()["error"]) == (413, True)

        with httpx.Client(base_url=address, timeout=60) as http:
            with http.stream("POST", "/api/generate", json=long) as first:
                lines = first.iter_lines()
                next(lines)
                with http.stream("POST", "/api/generate", json=long):
                    refused = post(short)
                    assert (refused.status_code, "busy" in refused.json()["error"]) == (429, True)
                    refused = post(short | {"options": None}, "/v1/completions")
                    assert refused.json()["error"]["type"] == "rate_limit_error"
            # both went away: their places are free as soon as the server has seen it
            end = time.monotonic() + 60
            while (answer := post(short)).status_code == 429:
                assert time.monotonic() < end
            assert answer.json()["eval_count"] == 2

            # one that waits for the whole and goes away
            with pytest.raises(httpx.ReadTimeout):
                http.post("/api/generate", json=long | {"stream": False}, timeout=0.3)
            assert post(short).json()["eval_count"] == 2

            # one that goes away while it asks
            with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as half:
                half.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n")
                half.sendall(b"Content-Length: 100\r\n\r\n{")

            with http.stream("POST", "/api/generate", json=long) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGINT)
                assert json.loads(list(lines)[-1]) == {"error": "the server is stopping"}
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


def resident(pid):
    """Kilobytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("requests", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_requests(server, requests):
    """After a warm-up of 100 requests, no more than 10 MB are added by all the others."""
    address, process = server

    async def ask(http, number):
        prompt = f"The number {number} " * (number % 7)
        body = {"model": NAME, "prompt": prompt + "x", "options": {"num_predict": 2 + number % 5}}
        async with http.stream("POST", "/api/generate", json=body) as stream:
            assert stream.status_code == 200
            async for _ in stream.aiter_lines():
                if number % 5 == 0:
                    return  # this one goes away

    async def all_of_them(numbers):
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            for start in range(numbers.start, numbers.stop, 10):
                await asyncio.gather(*(ask(http, start + i) for i in range(10)))

    asyncio.run(all_of_them(range(100)))
    before = resident(process.pid)
    asyncio.run(all_of_them(range(100, 100 + requests)))
    assert resident(process.pid) - before < 10_000


# ------------------------------------------------------------------ the command


def test_the_command_is_quick_to_import_and_says_what_is_missing(served, monkeypatch):
    script = "import sys, ysnake.serve; print({'torch', 'starlette', 'uvicorn'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
    code, printed, _ = entry(serve.main, "--help")
    assert code == 0
    assert "127.0.0.1" in printed
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, errors = entry(serve.main, served)
    assert (code, "pip install" in errors) == (2, True)


def test_a_port_that_is_taken(served, address):
    taken = address.rsplit(":", 1)[1]
    code, _, errors = entry(serve.main, served, "--port", taken)
    assert code == 2
    assert "Address already in use" in errors
