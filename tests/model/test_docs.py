"""README and docs: links lead somewhere, commands have the options they use, snippets run."""

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import ysnake_kernels
from small import corpus, entry, saved

import ysnake

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m (ysnake\.\w+|benchmarks\.\w+)([^\n`]*)")
PROGRAM = re.compile(r"(?:^|`|&& )ysnake ([a-z]+(?:-[a-z]+)*)\b([^\n`]*)", flags=re.M)


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def anchor(heading):
    """A heading's name in a link, as public hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, part = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} in {page.name}"
        if part:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert part in map(anchor, headings), f"{target} in {page.name}"


@cache
def help_of(module):
    if module.startswith("ysnake."):
        code, text, errors = entry(import_module(module).main, "--help")
    else:
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        code, text, errors = done.returncode, done.stdout, done.stderr
    assert code == 0, errors
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_have_the_options_they_use(page):
    text = page.read_text(encoding="utf-8")
    found = [(f"ysnake.{name.replace('-', '_')}", rest) for name, rest in PROGRAM.findall(text)]
    for module, rest in [*COMMAND.findall(text), *found]:
        words = shlex.split(re.split(r" && | \| | < |  #", rest)[0])
        for option in (word for word in words if word.startswith("-")):
            assert option in help_of(module), f"{module} {option} in {page.name}"


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


SNIPPETS = [(page, code) for page in PAGES for code in snippets(page)]


def given_scan():
    torch.manual_seed(0)
    x, dt = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2)
    B, C = torch.randn(2, 1, 9, 1, 8)
    A, D, bias = -torch.rand(2), torch.rand(2), torch.zeros(2)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "bias": bias}


@pytest.mark.parametrize(
    ("page", "code"), SNIPPETS, ids=[f"{page.name}: {code[:30]!r}" for page, code in SNIPPETS]
)
def test_snippets_run(page, code, tmp_path, monkeypatch):
    """Each in a folder with a run in runs/mine; one that needs a server is compiled only."""
    compiled = compile(code, str(page), "exec")
    if "ollama.Client" in code or "openai.OpenAI" in code:
        return
    if "dropin" in code:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if "my_book.txt" in code:
        corpus(tmp_path).rename(tmp_path / "my_book.txt")
        monkeypatch.chdir(tmp_path)
        compiled = compile(code.replace("max_steps=300", "max_steps=2"), str(page), "exec")
    if "runs/mine" in code:
        (tmp_path / "runs/mine").mkdir(parents=True)
        saved(tmp_path).rename(tmp_path / "runs/mine/best")
        shutil.copytree(tmp_path / "runs/mine/best", tmp_path / "runs/mine/last")
        monkeypatch.chdir(tmp_path)
    exec(compiled, given_scan())


def test_the_api_pages_have_every_public_name(tmp_path, monkeypatch):
    pages = pytest.importorskip("pdoc.__main__")
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -m pdoc (.*)$", text, flags=re.M)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages.cli(shlex.split(line))

    def shown(page):
        return set(re.findall(r'<section id="(\w+)">', Path(page).read_text(encoding="utf-8")))

    # ysnake.train is a module too, so its function has the page of the module that defines it
    of_ysnake = shown("api/ysnake.html") | shown("api/ysnake/trained_run.html")
    assert of_ysnake == set(ysnake.__all__)
    assert shown("api/ysnake_kernels.html") == set(ysnake_kernels.__all__)
    for package in (ysnake, ysnake_kernels):
        for name in package.__all__:
            assert getattr(package, name).__doc__
