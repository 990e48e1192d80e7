"""`ysnake watch` as its user meets it: a real process, HTTP, and the page in Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from chromium import browser, needs_chromium
from small import corpus, entry, environment

import ysnake
from ysnake import watch

SIZES = {"d_model": 32, "n_layers": 2, "d_state": 8, "head_dim": 8, "seq_len": 24, "batch_size": 4}


@contextmanager
def watching(folder):
    """The page's server for the runs in a folder; gives its address and the process."""
    command = [sys.executable, "-m", "ysnake.watch", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(), **pipes)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    data = corpus(folder)
    how = {"vocab_size": 300, "max_steps": 4, "eval_every": 2, "quiet": True, **SIZES}
    ysnake.train(data, run=folder / "runs/first <b>", **how)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with watching(folder) as (address, process):
        yield address, process


@pytest.fixture
def address(server):
    return server[0]


@pytest.fixture
def second(folder):
    """A run that another process trains: its files grow during a test."""
    run = folder / "runs/second"
    shutil.copytree(folder / "runs/first <b>", run)
    yield run
    shutil.rmtree(run)


def add(run, *steps, **more):
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(
                json.dumps({"step": step, "train_loss": 1.5, "seconds": step, **more}) + "\n"
            )


def test_runs_and_what_is_new_in_one(address, second):
    listed = httpx.get(f"{address}/runs").json()["runs"]
    assert {run["name"] for run in listed} == {"first <b>", "second"}
    assert {run["state"] for run in listed} == {"all steps done"}
    found = httpx.get(f"{address}/runs/second").json()
    assert [line["step"] for line in found["lines"]] == [1, 2, 3, 4]
    assert found["lines"][3]["val_loss"] > 0
    assert "held-out loss" in found["samples"]
    add(second, 5, resumed=True)
    with (second / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6')  # a line that is being written
    again = httpx.get(f"{address}/runs/second", params={"from": found["end"]}).json()
    assert [(line["step"], line["resumed"]) for line in again["lines"]] == [(5, True)]
    with (second / "metrics.jsonl").open("a") as file:
        file.write(', "train_loss": 2.0}\n')
    last = httpx.get(f"{address}/runs/second", params={"from": again["end"]}).json()
    assert [line["step"] for line in last["lines"]] == [6]
    beyond = httpx.get(f"{address}/runs/second", params={"from": 10**9}).json()
    assert (beyond["lines"], beyond["end"]) == ([], 0)
    odd = second.parent / os.fsdecode(b"r\xff")  # a name that is no text
    shutil.copytree(second, odd)
    try:
        assert len(httpx.get(f"{address}/runs").json()["runs"]) == 3
    finally:
        shutil.rmtree(odd)
    (second / "settings.json").write_text("{")
    states = {run["name"]: run["state"] for run in httpx.get(f"{address}/runs").json()["runs"]}
    assert states["second"].startswith("cannot be read")


def test_strangers_and_wrong_requests(address):
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 403
    for path in ("", "/runs"):
        headers = {"Origin": "https://evil.example"}
        assert httpx.get(address + path, headers=headers).status_code == 403
    for path in ("/runs/nowhere", "/runs/..%2f..%2fetc", "/settings.json"):
        assert httpx.get(address + path).status_code == 404
    for start in ("-1", "x", "1e9", "9" * 40):
        assert httpx.get(f"{address}/runs/second?from={start}").status_code == 400
    assert "script-src 'unsafe-inline'" in httpx.get(address).headers["content-security-policy"]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, errors = entry(watch.main)
    assert (code, errors.count("\n")) == (2, 1)
    assert "pip install" in errors


@needs_chromium
def test_the_page_follows_runs_and_says_when_the_server_is_gone(server, second, tmp_path):
    address, process = server
    with browser(tmp_path) as page:
        page.go(address, "document.querySelectorAll('polyline.train').length == 2")
        shown = "document.body.innerText"
        assert page.value("document.querySelectorAll('#runs li').length") == 2
        assert "first <b>" in page.value(shown)
        assert "held-out loss" in page.value("document.getElementById('samples').textContent")
        add(second, *range(5, 2000), peak_memory=3e9)
        add(second, 2000, resumed=True)
        page.wait_for(f"{shown}.includes('2,000')")
        assert page.value("document.querySelectorAll('line.resumed').length") == 1
        text = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
        (second / "metrics.jsonl").write_text("".join(text[:3]))  # resumed from an old checkpoint
        page.wait_for(f"!{shown}.includes('2,000')")
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        for width in (320, 1280):
            page.size(width)
            assert page.value(wide), f"the page is wider than {width} pixels"
        page.value("document.querySelector('#runs input').click()")
        page.wait_for("document.querySelectorAll('polyline.train').length == 1")
        assert process.poll() is None
        process.kill()  # the last test has no more use for it
        page.wait_for("document.getElementById('status').textContent.includes('does not answer')")
