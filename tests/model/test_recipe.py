"""docs/recipe.md: its commands run one after the other, on a tiny model, up to Ollama itself."""

import re
import shlex
from pathlib import Path

import pytest
from small import ROOT, TINY, corpus, entry

from ysnake import __main__ as front

PAGE = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("ysnake ")]


def test_the_recipe_works_to_its_end(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="pip install -e '.[gguf]' has it")
    monkeypatch.chdir(tmp_path)
    for name in ("my_texts", "unseen"):
        Path(name).mkdir()
        corpus(Path(name))
    for line in COMMANDS:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += ["--threads", "1"] if "--resume" in words else ["--threads", "1", *TINY]
            words += ["--max-steps", "4" if "--resume" in words else "2"]
        code, out, errors = entry(front.main, *words)
        assert code == 0, f"{line}\n{out}{errors}"
    assert Path("mine.gguf").stat().st_size > 1000
    assert "FROM ./mine.gguf" in Path("Modelfile").read_text()
    Path("Modelfile").write_text("FROM mine\n")
    code, _, errors = entry(front.main, *shlex.split(COMMANDS[-1])[1:])
    assert (code, errors.count("\n")) == (2, 1)
    assert "Modelfile: exists, and was written or changed by someone else" in errors
    assert Path("Modelfile").read_text() == "FROM mine\n"
