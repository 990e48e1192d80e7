"""Input and output of any kind: other encodings, readers and terminals that are gone, odd names."""

import io
import json
import os
import sys
from contextlib import suppress

import pytest
from rich.console import Console
from small import TINY, entry, saved

from ysnake import run, train
from ysnake.shared import cli, terminal
from ysnake.shared.errors import InputError
from ysnake.training import plot


def stream(data, encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def test_a_prompt_in_another_encoding_is_one_line(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stream(b"caf\xe9 in the grass"))
    code, out, errors = entry(run.main, model, "--max-tokens", "2")
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert "standard input: byte 3 is not UTF-8; convert the text" in errors
    code, _, errors = entry(run.main, model, "--max-tokens", "2", "--prompt", "é caf\udce9")
    assert (code, errors.count("\n")) == (2, 1)
    assert "--prompt: byte 6 is not UTF-8" in errors


def test_in_a_conversation_the_next_line_may_be_right(model, monkeypatch, capsys):
    lines = iter(["caf\udce9", "The boa"])

    def typed(_):
        return next(lines, None) or (_ for _ in ()).throw(EOFError)

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", stream(b""))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, out, errors = entry(run.main, model, "--max-tokens", "2")
    assert code == 0
    assert "error: this line: byte 3 is not UTF-8" in errors
    assert out != ""


def test_closed_standard_input_is_an_empty_prompt(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert entry(run.main, model, "--max-tokens", "2")[0] == 0


def test_what_the_output_cannot_express_is_escaped(monkeypatch):
    out = stream(b"", "latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stream(b"", "ascii"))
    terminal.prepare()
    print("naïve 蛇")
    print("蛇", file=sys.stderr)
    out.flush()
    assert out.buffer.getvalue() == b"na\xefve \\u86c7\n"


def test_what_the_output_cannot_express_is_escaped_from_python_too():
    out = stream(b"", "cp1252")
    lasting = terminal.LastingOutput(out)
    lasting.write("naïve € \ufffd \x81")  # cp1252 has a euro, and no \x81
    lasting.flush()
    assert out.buffer.getvalue() == b"na\xefve \x80 \\ufffd \\x81"


def test_windows_has_utf8_in_files_and_pipes(monkeypatch):
    monkeypatch.setattr(terminal, "WINDOWS", True)
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "stdin", stream("naïve 蛇".encode(), "cp1252"))
    monkeypatch.setattr(sys, "stdout", out := stream(b"", "cp1252"))
    terminal.prepare()
    print(terminal.read_input(), end="", flush=True)
    assert out.buffer.getvalue().decode() == "naïve 蛇"


def test_a_folder_whose_name_is_not_utf8_is_refused_before_anything_is_written(tmp_path, model):
    options = ["--data", model.parent / "snakes.txt", "--run", tmp_path / "caf\udce9", *TINY]
    code, _, errors = entry(train.main, *options, "--vocab-size", "300")
    assert (code, errors.count("\n")) == (2, 1)
    assert r"the name is not UTF-8; rename the folder" in errors
    assert list(tmp_path.iterdir()) == []
    code, _, errors = entry(run.main, tmp_path / "caf\udce9", "--prompt", "x")
    assert (code, errors.count("\n")) == (2, 1)


def test_output_that_nobody_reads_any_more_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as out:
        monkeypatch.setattr(sys, "stdout", out)
        console = cli.console()
        for _ in range(3):
            console.print("step 1")


def test_names_are_shown_as_they_are(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    for name in ("[red]mine[/red]", "[/]", "a\x1b[2Jb\nc", "end\\", "$x$ 蛇"):
        cli.console().print(f"[bold]{cli.markup(name)}[/]: done")
    assert out.getvalue().splitlines() == [
        "[red]mine[/red]: done",
        "[/]: done",
        r"a\x1b[2Jb\nc: done",
        "end\\: done",
        "$x$ 蛇: done",
    ]


@pytest.mark.parametrize("name", ["cost $5$ {x^", "[bold]", "蛇", "caf\udce9", "a\nb"])
def test_a_picture_has_the_name_of_any_run(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    line = {"step": 1, "train_loss": 2.0, "val_loss": 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    plot.plot_loss(folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path):
    out = io.StringIO()
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
    plot.draw_loss(tmp_path, Console(file=out, soft_wrap=True))
    assert "loss.png cannot be drawn (" in out.getvalue()
    assert out.getvalue().count("\n") == 1
    (tmp_path / "metrics.jsonl").unlink()
    plot.draw_loss(tmp_path, Console(file=out, soft_wrap=True))
    assert out.getvalue().count("cannot be drawn") == 2


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    from ysnake.shared.files import replacing

    path, mine = tmp_path / "x", tmp_path / "mine"
    mine.write_text("mine")
    path.symlink_to(mine)
    with replacing(path) as new:
        new.write_text("new")
    assert (path.read_text(), mine.read_text(), path.is_symlink()) == ("new", "mine", False)
    with suppress(ZeroDivisionError), replacing(path) as new:
        new.write_text(f"half {1 / 0}")
    assert path.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for other, kind in ((tmp_path / "pipe", "a device or a pipe"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"found {kind}"), replacing(other):
            pass
    assert {p.name for p in tmp_path.iterdir()} == {"x", "mine", "pipe"}
