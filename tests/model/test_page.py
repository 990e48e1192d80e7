"""The page in Chromium: writing, the texts that it keeps, errors, keyboard, phone and desktop."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chromium import browser, needs_chromium
from running_server import NAME, options

from ysnake.serving.application import PAGE

pytestmark = needs_chromium
TEXT = "document.getElementById('text').textContent"
STATUS = "document.getElementById('status').textContent"
READY = "typeof model != 'undefined' && !!model"
ENDED = "!document.querySelector('.writing')"
WIDE = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
SEEN = """(() => {
  const { top, bottom } = document.getElementById('%s').getBoundingClientRect();
  return bottom > top && top >= 0 && bottom <= innerHeight;
})()"""
KEYS = {"Enter": 13, "Tab": 9, "Escape": 27}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(chromium, address):
    """The page of the server, as a new visitor opens it."""
    forget(chromium, f"{address}/api/version")
    chromium.size(900, 900)
    chromium.go(address, READY)
    choose(chromium, num_predict=12, seed=3)
    return chromium


def forget(page, address):
    """Go to an address without a script, and remove what the browser keeps of the server."""
    page.go(address, f"location.href == {json.dumps(address)}")
    page.value("localStorage.clear(); sessionStorage.clear()")


def choose(page, **settings):
    for name, value in settings.items():
        page.value(f"document.querySelector('[name={name}]').value = {json.dumps(value)}")


def click(page, name):
    page.value(f"document.getElementById('{name}').click()")


def key(page, name, **more):
    more |= {"text": "\r"} if name == "Enter" and not more else {}
    page.press(name, code=name, windowsVirtualKeyCode=KEYS[name], **more)


def write(page, text):
    page.value("document.getElementById('prompt').focus()")
    page.value("document.getElementById('prompt').select()")
    page.type(text)
    key(page, "Enter", modifiers=2)  # with Ctrl
    page.wait_for(f"{ENDED} && {STATUS} != ''")


def kept(page):
    """The texts in the list, the newest first."""
    return page.value("kept().map(({text}) => text)")


def test_it_completes_goes_on_and_stops(page, client):
    write(page, "The <b>adder")
    first = client.generate(NAME, "The <b>adder", options=options()).response
    assert page.value(TEXT) == "The <b>adder" + first
    choose(page, num_predict=4000, seed="", temperature=2, top_p=1)
    click(page, "more")
    page.wait_for(f"{TEXT}.length > {len(first) + 40} || {ENDED}")
    key(page, "Escape")
    page.wait_for(ENDED)
    assert page.value(TEXT).startswith("The <b>adder" + first)
    assert kept(page) == [page.value(TEXT)]


def test_texts_survive_a_reload(page, address):
    write(page, "The boa")
    first = page.value(TEXT)
    click(page, "again")
    page.wait_for(f"{ENDED} && {TEXT} != {json.dumps(first)}")
    second = page.value(TEXT)
    assert second.startswith("The boa")
    assert page.value("document.querySelector('[name=seed]').value") == "4"
    click(page, "new")
    assert page.value(TEXT) == ""
    page.type("A draft")
    page.go(f"{address}/?again", f"location.search == '?again' && {READY}")
    assert page.value("document.getElementById('prompt').value") == "A draft"
    assert page.value("document.querySelector('[name=num_predict]').value") == "12"
    assert kept(page) == [second, first]
    page.value("document.querySelectorAll('#list button')[2].click()")  # the older one
    assert page.value(TEXT) == first
    page.value("window.confirm = () => true")
    page.value("document.querySelectorAll('#list button')[3].click()")
    assert kept(page) == [second]
    assert page.value(TEXT) == ""


def test_copy_and_export(page):
    write(page, "The krait")
    text = page.value(TEXT)
    page.value("URL.createObjectURL = (blob) => { window.exported = blob; return '#'; }")
    for button in ("export", "all"):
        page.value("window.exported = null")
        click(page, button)
        assert page.value("exported.text()") == text
    click(page, "copy")
    page.wait_for(f"{STATUS} == 'Copied' || {STATUS}.startsWith('The text is selected')")
    if page.value(STATUS) != "Copied":
        assert page.value("getSelection().toString()").strip() == text.strip()


def test_going_on_after_an_end(page, client):
    whole = client.generate(NAME, "The viper", options=options()).response
    stop = next(c for c in whole[2:] if c.isascii() and c.isprintable())
    choose(page, stop=stop)
    write(page, "The viper")
    before = "The viper" + whole[: whole.index(stop)]
    assert page.value(TEXT) == before
    assert "the text ended here" in page.value(STATUS)
    click(page, "more")
    page.wait_for(f"{ENDED} && {STATUS} != ''")
    assert page.value(TEXT).startswith(before + stop)

    def ends(seed):  # the model itself
        how = options(seed=seed, num_predict=100)
        return client.generate(NAME, "The viper", options=how).done_reason == "stop"

    seed = next(seed for seed in range(100) if ends(seed))
    choose(page, stop="", seed=seed, num_predict=100)
    write(page, "The viper")
    before = page.value(TEXT)
    choose(page, seed=seed + 1)
    click(page, "more")
    page.wait_for(f"{ENDED} && {STATUS} != ''")
    assert page.value(TEXT).startswith(before + "\n\n") or "adds nothing" in page.value(STATUS)


@pytest.mark.parametrize("width", [320, 1280])
def test_an_error_is_seen_in_words_of_the_page(page, width):
    choose(page, num_predict=400, seed="", temperature=2, top_p=1)
    write(page, "The python")
    text = page.value(TEXT)
    page.size(width, 700)
    choose(page, num_predict=1_000_000)
    click(page, "more")
    page.wait_for(f"{ENDED} && !!document.querySelector('.alarm')")
    assert page.value(STATUS) == "Tokens at most: expected 1 to 4096, got 1000000"
    assert page.value("document.activeElement.name") == "num_predict"
    assert page.value(TEXT) == text
    assert page.value(SEEN % "status")
    assert page.value(WIDE), f"the page is wider than {width} pixels"
    choose(page, num_predict=5)
    click(page, "more")
    page.wait_for(f"{ENDED} && {STATUS} != '' && !document.querySelector('.alarm')")
    assert not page.value("document.querySelector('[aria-invalid]')")


def test_stop_is_in_sight_while_a_long_text_is_written(page):
    page.size(320, 500)
    choose(page, num_predict=4000, seed="", temperature=2, top_p=1)
    page.value("document.getElementById('prompt').focus()")
    page.type("The boa " * 60)
    key(page, "Enter", modifiers=2)
    page.wait_for(f"{TEXT}.length > 600 || {ENDED}")
    ended_at_once = f"({ENDED} && {TEXT}.length <= 600)"
    page.wait_for(f"{SEEN % 'stop'} || {ended_at_once}")
    key(page, "Escape")
    page.wait_for(ENDED)


def test_the_keyboard_is_enough(page):
    page.value("document.getElementById('prompt').focus()")
    page.type("The mamba")
    key(page, "Tab")
    assert page.value("document.activeElement.id") == "write"
    key(page, "Enter")
    page.wait_for(f"{ENDED} && {STATUS} != ''")
    assert page.value("document.activeElement.id") == "write"
    reached = []
    for _ in range(12):
        key(page, "Tab")
        reached.append(page.value("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "SUMMARY" and "more" in reached:
            break
    assert reached == ["new", "SUMMARY", "more", "again", "copy", "export", "SUMMARY"]
    key(page, "Enter")  # opens the list
    key(page, "Tab")
    assert page.value("document.activeElement.closest('#list') != null")
    choose(page, num_predict=4000, temperature=2, top_p=1)
    page.value("document.getElementById('again').focus()")
    key(page, "Enter")
    page.wait_for(f"document.activeElement.id == 'stop' || {ENDED}")
    key(page, "Escape")
    page.wait_for(ENDED)
    assert page.value("document.activeElement.id") in ("more", "again")


# ------------------------------------------------------------------ servers that go wrong

PART = json.dumps({"response": " sleeps", "done": False}).encode() + b"\n"
WRONG_KEY = 401, b'{"error": "wrong key"}'
STOPPING = json.dumps({"error": "the server is stopping"}).encode() + b"\n"


class Handler(BaseHTTPRequestHandler):
    """Sends the page, and for a completion what the test has put into `server.answer`."""

    def log_message(self, *args):
        pass

    def send(self, status, content, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path == "/":
            self.send(200, PAGE.read_bytes(), "text/html")
        else:
            tag = {"name": "boa:latest", "details": {"parameter_size": "1.0M"}}
            self.send(200, json.dumps({"models": [tag]}).encode(), "application/json")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send(*self.server.answer, "application/x-ndjson")


@pytest.fixture(scope="module")
def stand_in():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("answer", "said", "text"),
    [
        ((200, PART), "The server went away while it wrote", "The boa sleeps"),
        ((200, PART + STOPPING), "The server was stopped", "The boa sleeps"),
        ((200, b""), "The server went away while it wrote", "The boa"),
        ((429, b'{"error": "busy"}'), "The server is busy", ""),
        ((401, b'{"error": "no key"}'), "This server needs its API key", ""),
        (WRONG_KEY, "This is not the key of the server", ""),
        ((502, b"<html>"), "The server answered with status 502", ""),
        ((400, b'{"error": "prompt: expected a string"}'), "The text: expected", ""),
        (None, "The server does not answer. Is it still running?", ""),
    ],
)
def test_a_server_that_goes_wrong(chromium, stand_in, answer, said, text):
    stand_in.answer = answer or (200, b"")
    address = f"http://127.0.0.1:{stand_in.server_port}"
    forget(chromium, f"{address}/api/tags")
    chromium.go(address, READY)
    if answer == WRONG_KEY:
        chromium.value("sessionStorage.setItem('key', 'x')")
    if answer is None:
        gone = "window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))"
        chromium.value(gone)  # as a browser does where nothing listens
    write(chromium, "The boa")
    assert chromium.value(STATUS).startswith(said)
    assert chromium.value("document.getElementById('status').className") == "alarm"
    assert chromium.value("document.getElementById('prompt').value") == "The boa"
    assert chromium.value(TEXT) == text
    assert kept(chromium) == ([text] if text == "The boa sleeps" else [])
