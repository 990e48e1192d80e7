"""docs/server.md: its tables name what the server knows, and each row is tried."""

import json
import re
import shlex

import httpx
import pytest
from running_server import NAME
from small import ROOT

from ysnake.serving import ollama_api, openai_api

PAGE = (ROOT / "docs/server.md").read_text(encoding="utf-8")
KNOWN = ollama_api.FIELDS | openai_api.FIELDS
SHORT = {path.split("/", 2)[2]: path for path in KNOWN}
TALK = [{"role": "user", "content": "Hi"}]
BODIES = {  # what each endpoint needs
    "generate": {"prompt": "x"},
    "chat": {"messages": TALK},
    "embed": {"input": "x"},
    "show": {},
    "completions": {"prompt": "x"},
    "chat/completions": {"messages": TALK},
    "embeddings": {"input": "x"},
}
OTHER = [1234, "other", True, ["x"], {"x": 1}]  # values that no unsupported field accepts


def table(header):
    """The rows of a table of the page, as lists of cells."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def code(cell):
    return re.findall(r"`(.+?)`", cell)


def rows(header):
    """(field, where, values) for each field and each place in a table."""
    for cells in table(header):
        values = [json.loads(v) for v in code(cells[2])] if len(cells) > 2 else []
        for name in code(cells[0]):
            for where in cells[1].rstrip("|").strip().split(", "):
                yield name, where, values


USED = list(rows("| field | of | example |"))
UNSUPPORTED = list(rows("| field | of | accepted |"))
IGNORED = list(rows("| field | of |\n"))


def test_the_tables_name_all_fields():
    for where, known in [(w, KNOWN[path]) for w, path in SHORT.items()] + [
        ("options", ollama_api.OPTIONS)
    ]:
        assert {n for n, w, _ in USED if w == where} == known.used, where
        assert {n: tuple(v) for n, w, v in UNSUPPORTED if w == where} == known.neutral, where
        assert {n for n, w, _ in IGNORED if w == where} == known.ignored, where


def body_of(endpoint):
    """A good request for very little text."""
    body = {"model": NAME} | BODIES[endpoint]
    if endpoint in ("generate", "chat"):
        return body | {"options": {"num_predict": 1}}
    return body | ({"max_tokens": 1} if "completions" in endpoint else {})


@pytest.fixture(scope="module")
def ask(address):
    """Send a request with one more field; gives the status and the text of the answer."""
    with httpx.Client(base_url=address, timeout=60) as http:

        def ask(where, name, value):
            endpoint = "generate" if where == "options" else where
            body = body_of(endpoint)
            if name == "name":
                del body["model"]
            if name == "max_completion_tokens":
                del body["max_tokens"]
            value = NAME if value == "NAME" else value
            (body["options"] if where == "options" else body)[name] = value
            answer = http.post(SHORT[endpoint], json=body)
            return answer.status_code, answer.text

        yield ask


@pytest.mark.parametrize("where", [*SHORT, "options"])
def test_each_row_does_what_it_says(ask, where):
    for name, _, values in (row for row in USED if row[1] == where):
        assert len(values) == 1, f"{name} needs one example"
        assert ask(where, name, values[0])[0] == 200, name
    for name, _, values in (row for row in UNSUPPORTED if row[1] == where):
        for value in [*values, None]:
            assert ask(where, name, value)[0] == 200, (name, value)
        for value in OTHER:
            if value not in values:
                status, text = ask(where, name, value)
                assert (status, "does not support it" in text, name in text) == (400, True, True)
    for name, _, _ in (row for row in IGNORED if row[1] == where):
        for value in OTHER:
            assert ask(where, name, value)[0] == 200, name
    status, text = ask(where, "in_no_table", 1)
    assert (status, "in_no_table" in text) == (400, True)


def test_the_lines_for_curl_work(address):
    """Each is sent as curl sends it: with -d alone the body is called a form."""
    lines = [shlex.split(line) for line in PAGE.splitlines() if line.startswith("curl ")]
    assert len(lines) == 2
    for _, url, *options in lines:
        given = dict(zip(options[::2], options[1::2], strict=True))
        kind = given.get("-H", "Content-Type: application/x-www-form-urlencoded")
        headers = dict([kind.split(": ")])
        body = given["-d"].replace("NAME", NAME)
        url = url.replace("http://127.0.0.1:11435", address)
        answer = httpx.post(url, content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == NAME


def test_each_endpoint_answers(address):
    endpoints = [(*code(cells[0])[0].split(), cells[2]) for cells in table("| endpoint |")]
    posts = {path for method, path, _ in endpoints if method == "POST"}
    assert posts == KNOWN.keys()
    for method, path, gives in endpoints:
        if method == "POST":
            body = body_of(path.split("/", 2)[2])
            answer = httpx.post(address + path, json=body, timeout=60)
            assert ("streamed" in gives) == ("ndjson" in answer.headers["content-type"]), path
        else:
            answer = httpx.get(address + path.replace("NAME", NAME))
        assert answer.status_code == 200, path
