"""Control characters from files, models and errors reach the terminal as text only."""

import json

import pytest
from small import entry, saved

from ysnake import run
from ysnake.checkpoints import checkpoint
from ysnake.inference import generate
from ysnake.shared.errors import InputError
from ysnake.shared.shown import amount, escape_controls
from ysnake.text.tokenizer import encode


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 👩\u200d🚀", "plain ü 漢 👩\u200d🚀"),
        ("\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07"),
        ("\x9b31m \x7f", r"\x9b31m \x7f"),
        ("one\ntwo\r\tend", r"one\ntwo\r\tend"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("half \udcff", r"half \udcff"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert escape_controls(text) == shown
    shown.encode()


def test_kept_characters_stay():
    assert escape_controls("a\n\tb\r\x1b", keep="\n\t") == "a\n\tb\\r\\x1b"


def test_an_error_cannot_steer_the_terminal(tmp_path):
    folder = saved(tmp_path)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "\x1b[2J\n\x07"}))
    code, out, errors = entry(run.main, folder, "--prompt", "x")
    assert code == 2
    assert r"got \x1b[2J\n\x07" in errors
    assert not set("\x1b\x07") & set(out + errors)


def test_a_completion_cannot_steer_the_terminal(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    ids = encode(checkpoint.load_tokenizer(folder), "one\n\x1b]0;title\x07\ttwo")
    drawn = iter([*ids, 0])  # 0 ends the text
    monkeypatch.setattr(generate, "choose", lambda *_: next(drawn))
    code, out, _ = entry(run.main, folder, "--prompt", "x")
    assert code == 0
    assert out == "one\n\\x1b]0;title\\x07\ttwo\n"


def test_amounts():
    shown = [amount(number, "document") for number in (0, 1, 2000)]
    assert shown == ["0 documents", "1 document", "2,000 documents"]


def test_an_error_is_one_line_whatever_a_file_holds():
    assert str(InputError("a\nb\x1b[2J: not a name")) == r"a\nb\x1b[2J: not a name"
