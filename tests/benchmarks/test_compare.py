"""The comparison with peers runs with the ones that are installed, at tiny shapes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.compare import main
from ysnake.shared.errors import InputError

ROOT = Path(__file__).parents[2]


def compare(*arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels")} | environment
    command = [sys.executable, "-m", "benchmarks.compare", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, env=environment, cwd=ROOT, **options)


@pytest.mark.slow
def test_ours_and_peers_take_turns(tmp_path):
    done = compare("scan", "step", "--quick", "--repeat", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    results = json.loads((tmp_path / "compare.json").read_text())
    assert list(results) == ["scan", "step"]
    peers = {"transformers Mamba2", "transformers with our drop-in", "transformers GPT-2"}
    for case, result in results.items():
        assert result["machine"]["cpu"]
        (group,) = result["groups"]
        rows = {row["by"]: row for row in group["rows"]}
        assert {"ysnake", "matrix products alone"} <= rows.keys()
        assert {by for by in rows if not by.startswith(("ysnake", "matrix products"))} <= peers
        for name, row in rows.items():
            if name in peers and not find_spec("transformers"):
                assert row["absent"] == "transformers not installed"
                continue
            assert len(row["seconds"]) == 2
            assert min(row["seconds"]) > 0
            assert row["peak"] > 50e6
            median, least, most = row["ratios"]["ysnake"]
            assert least <= median <= most
        assert rows["ysnake"]["ratios"]["ysnake"] == [1, 1, 1]
        text = (tmp_path / "compare.md").read_text()
        assert all(f"| {name} |" in text for name in rows), case
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"compare-throughput.png", "compare-memory.png"}


@pytest.mark.slow
def test_rounded_products_take_turns_too(tmp_path):
    done = compare("scan", "--quick", "--repeat", 1, "--rounded", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    (group,) = json.loads((tmp_path / "compare.json").read_text())["scan"]["groups"]
    precisions = {row["by"]: row["precision"] for row in group["rows"]}
    assert precisions["ysnake"] == "highest"
    assert precisions["ysnake, 16-bit products"] == "medium"
    rows = {row["by"]: row for row in group["rows"]}
    assert "ysnake, 16-bit products" in rows["ysnake"]["ratios"]


def test_what_is_wrong_is_said_in_one_line():
    done = compare("scan", "--repeat", 0)
    assert done.returncode == 2
    assert "--repeat: expected at least 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality"], "--text: quality needs a file"),
        (["quality", "--text", "few.txt"], "--text: expected at least"),
        (["scan", "--threads", "0"], "--threads: expected at least 1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("too little")
    with pytest.raises(InputError, match=message):
        main([*arguments, "--out", "out"])
    assert not Path("out").exists()
