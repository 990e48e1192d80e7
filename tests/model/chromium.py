"""Headless Chromium for the tests of a page, driven by its DevTools protocol."""

import itertools
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Page:
    """A tab of the browser."""

    def __init__(self, send):
        self.send = send

    def value(self, expression):
        """The value of an expression in the page's JavaScript."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + 60
        while not self.value(expression):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.05)

    def press(self, key, **more):
        """Press and release a key."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **more)

    def type(self, text):
        """Insert a text where the cursor is."""
        self.send("Input.insertText", text=text)

    def size(self, width, height=800):
        """Give the tab this size. A narrow one is a phone's."""
        more = {"deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, **more)

    def go(self, address, ready):
        """Open an address and wait until an expression is true."""
        self.send("Page.navigate", url=address)
        self.wait_for(f"document.readyState == 'complete' && {ready}")


@contextmanager
def browser(profile):
    """Start Chromium; gives a tab."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    flags += f" --remote-debugging-pipe --user-data-dir={profile} --window-size=900,900"
    ours, theirs = os.pipe(), os.pipe()
    # the DevTools protocol over a pipe: it reads descriptor 3 and writes descriptor 4
    shell = f'exec "$0" {flags} 3<&{ours[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM],
        pass_fds=(ours[0], theirs[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(ours[0])
    os.close(theirs[1])
    numbers, session = itertools.count(1), {}

    def send(method, **parameters):
        message = {"id": next(numbers), "method": method, "params": parameters, **session}
        writer.write(json.dumps(message).encode() + b"\0")
        writer.flush()
        while True:
            answer = bytearray()
            while (byte := reader.read(1)) != b"\0":
                assert byte, "Chromium ended"
                answer += byte
            answer = json.loads(answer)
            if answer.get("id") == message["id"]:
                assert "result" in answer, answer
                return answer["result"]

    with os.fdopen(ours[1], "wb") as writer, os.fdopen(theirs[0], "rb") as reader:
        try:
            target = send("Target.createTarget", url="about:blank")["targetId"]
            attached = send("Target.attachToTarget", targetId=target, flatten=True)
            session["sessionId"] = attached["sessionId"]
            yield Page(send)
        finally:
            process.kill()
            process.wait()
