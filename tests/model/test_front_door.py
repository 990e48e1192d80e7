"""The command `ysnake`, the conversation that remembers, the list of runs, and the doctor."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from small import TINY, corpus, entry, python, saved
from ysnake_kernels import preemption

from ysnake import __main__ as front
from ysnake import __version__, doctor, language_model, run, runs, train
from ysnake.checkpoints import checkpoint
from ysnake.inference import chat as chat_module
from ysnake.inference import conversation, generate
from ysnake.inference.chat import Chat
from ysnake.inference.conversation import read
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context
from ysnake.inference.model_options import ModelOptions
from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import TextStream
from ysnake.shared import cli, progress, run_files, run_lock
from ysnake.shared.errors import InputError
from ysnake.shared.shown import escape_controls
from ysnake.text.tokenizer import decode, encode
from ysnake.training.plot import recent_means


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of the user's, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bare_ysnake_says_what_to_do_next(here, capsys):
    assert front.main([]) == 0
    assert "ysnake train" in capsys.readouterr().out.splitlines()[-1]
    (here / "runs/first").mkdir(parents=True)
    (here / "runs/first/settings.json").write_text("{}")
    assert front.main([]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "first" in last
    assert "ysnake chat" in last


def test_every_command_is_there(here, capsys):
    for name in front.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            front.main([name, "--help"])
        assert ended.value.code == 0
        assert f"usage: ysnake {name}" in capsys.readouterr().out
    assert front.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ysnake {__version__}\n"
    with pytest.raises(SystemExit):
        front.main(["generate_data", "--help"])
    with pytest.raises(InputError, match="brew: expected one of train"):
        front.main(["brew"])


def test_a_run_is_found_by_its_name(here, capsys):
    (here / "runs").mkdir()
    saved(here / "runs")
    options = ("--prompt", "The adder", "--temperature", "0", "--max-tokens", "3")
    told = [entry(run.main, name, *options) for name in ("model", "runs/model")]
    assert told[0] == told[1]
    assert told[0][0] == 0
    losses = [language_model.load(name).loss("The adder") for name in ("model", "runs/model")]
    assert losses[0] == losses[1]


def test_a_wrong_name_of_an_implementation_is_named(here, monkeypatch):
    monkeypatch.setenv("YSNAKE_BACKEND", "fast")
    code, _, errors = entry(run.main, saved(here), "--prompt", "x")
    assert (code, errors.count("\n")) == (2, 1)
    assert "YSNAKE_BACKEND: expected one of" in errors


def test_as_a_module(here):
    done = python("ysnake", "--version", cwd=here)
    assert done.stdout == f"ysnake {__version__}\n"


# The conversation


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    _, tokenizer, model = checkpoint.load_all(saved(tmp_path_factory.mktemp("chat")))
    return Decoder(model), tokenizer


@pytest.fixture
def chat(loaded):
    return Chat(*loaded, Sampling(temperature=0), 5, ())


def test_a_long_text_is_read_with_progress(chat, monkeypatch, capsys):
    chat.answer("The adder")
    capsys.readouterr()
    monkeypatch.setattr(conversation, "SHOWN_FROM", 3)
    monkeypatch.setattr(progress, "LOG_EVERY", 0)
    chat.answer("The boa " * 400)
    shown = capsys.readouterr()
    assert re.search(r"reading the prompt: 512 of [0-9,]+ tokens", shown.err)
    assert "reading" not in shown.out


def test_ctrl_c_while_a_text_is_read_forgets_the_text(chat, monkeypatch, capsys):
    chat.answer("The adder")
    before = chat.context.logits.clone()
    feed, pieces = Context.feed, []

    def interrupted(context, ids):
        pieces.append(ids)
        if len(pieces) == 2:
            raise KeyboardInterrupt
        feed(context, ids)

    monkeypatch.setattr(conversation, "SHOWN_FROM", 3)
    monkeypatch.setattr(Context, "feed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.answer("The boa " * 400)
    assert len(pieces) == 2
    assert torch.equal(chat.context.logits, before)
    assert "the text is forgotten" in capsys.readouterr().err


def test_ctrl_c_never_stops_inside_the_model(chat, monkeypatch, capsys):
    """Some layers would have read a token, and others not."""
    feed, pieces = Context.feed, []

    def pressed(context, ids):
        pieces.append(ids)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # a handler runs between two operations of Python
        feed(context, ids)

    monkeypatch.setattr(Context, "feed", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat.answer("The adder")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "[stopped]" in capsys.readouterr().err
    monkeypatch.undo()
    whole = Context(chat.decoder, chat.context.n_tokens)
    whole.feed([token for ids in pieces for token in ids])
    assert torch.allclose(whole.logits, chat.context.logits, atol=1e-5)


def test_ctrl_c_that_is_ignored_stays_ignored(chat, monkeypatch, capsys):
    """A shell has its commands in the background ignore it."""
    feed = Context.feed

    def pressed(context, ids):
        os.kill(os.getpid(), signal.SIGINT)
        feed(context, ids)

    monkeypatch.setattr(Context, "feed", pressed)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        chat.answer("The adder")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "[stopped]" not in capsys.readouterr().err


def test_it_remembers_what_was_said(chat, loaded, capsys):
    """As if all lines and replies were one text."""
    decoder, tokenizer = loaded
    chat.answer("The adder")
    first = capsys.readouterr()
    assert "tokens, " in first.err
    chat.answer("The boa")
    whole = Context(decoder, tokenizer.get_vocab_size())
    for text in ("The adder", "\n", "The boa", "\n"):
        read(whole, tokenizer, text)
        if text != "\n":
            ids = list(whole.copy().generate(Sampling(temperature=0), 5))
            stream = TextStream(whole.last_token)
            for token in ids:
                stream.step(tokenizer, token)
            whole.feed(ids[: len(ids) - len(stream.held)])  # without a part of a character
    torch.testing.assert_close(chat.context.logits, whole.logits)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts lost cores")
def test_a_busy_machine_does_not_interrupt_it(tmp_path, monkeypatch, caplog):
    for name in preemption.CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preemption, "MOST", -1)  # any machine counts as busy
    monkeypatch.setattr(preemption, "watch", preemption.Watch(window=0))
    folder = saved(tmp_path)
    Chat(*ModelOptions(folder).load(), Sampling(), 5, ()).answer("The adder")
    assert not caplog.messages
    monkeypatch.setattr(preemption, "watch", preemption.Watch(window=0))
    language_model.load(folder).loss("The adder")
    assert caplog.messages == [f"warning: {preemption.ADVICE}"]


def test_the_model_remembers_no_stop_text_and_nothing_behind_it(chat, loaded, capsys):
    """The model remembers what was shown, in a chat and where an empty line continues a text."""
    decoder, tokenizer = loaded
    whole = Context(decoder, tokenizer.get_vocab_size())
    read(whole, tokenizer, "The adder")
    reply = decode(tokenizer, list(whole.generate(Sampling(temperature=0), 5)))
    chat.stops = (reply[len(reply) // 2 :][:2],)
    shown = reply[: reply.index(chat.stops[0])]
    chat.answer("The adder")
    assert capsys.readouterr().out == f"{escape_controls(shown, keep=chr(10))}\n"
    right = Context(decoder, tokenizer.get_vocab_size())
    for text in ("The adder", shown):
        read(right, tokenizer, text)
    after = right.copy()
    read(after, tokenizer, "\n")
    torch.testing.assert_close(chat.context.logits, after.logits)
    start = Context(decoder, tokenizer.get_vocab_size())
    read(start, tokenizer, "The adder")
    how = (Sampling(temperature=0), 5, chat.stops)
    context = conversation.complete(start, tokenizer, *how).context
    torch.testing.assert_close(context.logits, right.logits)


def test_the_model_remembers_no_part_of_a_character(loaded, monkeypatch, capsys):
    """The largest number of tokens may end a reply within a character, which is then not shown."""
    decoder, tokenizer = loaded
    ids = encode(tokenizer, "ab蛇")
    assert len(ids) >= 4
    context = Context(decoder, tokenizer.get_vocab_size())
    read(context, tokenizer, "The adder")
    right = context.copy()
    right.feed(encode(tokenizer, "ab"))
    drawn = iter(ids)
    monkeypatch.setattr(generate, "choose", lambda *_: next(drawn))
    done = conversation.complete(context, tokenizer, Sampling(), len(ids) - 1, ())
    assert capsys.readouterr().out == "ab\n"
    torch.testing.assert_close(done.context.logits, right.logits)


def test_ctrl_c_while_a_reply_is_remembered_forgets_the_line(chat, monkeypatch, capsys):
    chat.answer("The adder")
    before = chat.context.logits.clone()

    def read_lines_only(context, tokenizer, text):
        if text == "\n":  # after the reply
            raise KeyboardInterrupt
        read(context, tokenizer, text)

    monkeypatch.setattr(chat_module, "read", read_lines_only)
    with pytest.raises(KeyboardInterrupt):
        chat.answer("The boa")
    assert torch.equal(chat.context.logits, before)
    assert "the text is forgotten" in capsys.readouterr().err
    chat.command("undo", [], "/undo")
    assert chat.context.logits is None


def test_a_closed_input_is_the_end_of_a_chat(chat, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    chat.talk()


def test_undo_and_clear(chat):
    chat.answer("The adder")
    logits = chat.context.logits
    chat.answer("The boa")
    chat.answer("/undo")
    assert torch.equal(chat.context.logits, logits)
    chat.answer("/undo")
    assert chat.context.logits is None
    with pytest.raises(InputError, match="/undo"):
        chat.answer("/undo")
    chat.answer("The adder")
    chat.answer("/clear")
    assert chat.context.logits is None
    chat.answer("")  # there is nothing to go on from
    assert chat.context.logits is None


def test_settings(chat, capsys):
    chat.answer("/set temperature 0.7")
    chat.answer("/set top-k 3")
    chat.answer("/set max_tokens 9")
    chat.answer("/set")
    assert (chat.sampling.temperature, chat.sampling.top_k, chat.max_tokens) == (0.7, 3, 9)
    assert "temperature 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("/sing", "/sing"),
        ("/", "/help"),
        ("/set temperature hot", "/set temperature"),
        ("/set temperature", "nothing"),
        ("/set temperature -1", "temperature"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set mood 3", "temperature"),
        ("/save", "/save"),
        ("/save nothing.state", "still empty"),
        ("/load missing.state", "missing.state"),
    ],
)
def test_commands_that_cannot_be_done(chat, here, line, names):
    with pytest.raises(InputError, match=names):
        chat.answer(line)
    assert chat.context.logits is None


def test_save_and_load(chat, loaded, here, capsys):
    chat.answer("The adder")
    chat.answer("/save of today.state")
    assert "MB at any length of text" in capsys.readouterr().err
    other = Chat(*loaded, Sampling(temperature=0), 5, ())
    other.answer("/load of today.state")
    torch.testing.assert_close(other.context.logits, chat.context.logits)


def test_help(chat, capsys):
    chat.answer("/help")
    said = capsys.readouterr().err
    assert all(command in said for command in ("/clear", "/undo", "/set", "/save", "/load", "/bye"))
    assert chat.context.logits is None


def test_a_slash_can_be_typed(chat):
    chat.answer("//bin")
    assert chat.context.logits is not None


def test_prompt_from_a_file(tmp_path):
    folder, long, bad = saved(tmp_path), tmp_path / "long.txt", tmp_path / "bad.txt"
    long.write_text("The adder " * 14_000, encoding="utf-8")
    options = ["--temperature", "0", "--max-tokens", "3"]
    assert entry(run.main, folder, "--prompt-file", long, *options)[0] == 0
    marked = tmp_path / "marked.txt"
    marked.write_text("\ufeffThe adder", encoding="utf-8")  # as some editors begin it
    told = entry(run.main, folder, "--prompt-file", marked, *options)
    assert told == entry(run.main, folder, "--prompt", "The adder", *options)
    bad.write_bytes(b"\xff")
    for file, names in ((bad, "is not UTF-8"), (tmp_path / "none.txt", "none.txt")):
        code, _, errors = entry(run.main, folder, "--prompt-file", file)
        assert (code, errors.count("\n")) == (2, 1)
        assert names in errors


# The list of runs


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = corpus(folder)
    for name, lr in (("first", "0.001"), ("second", "0.002")):
        argv = [*TINY, "--data", str(data), "--run", str(folder / "runs" / name), "--lr", lr]
        argv += ["--vocab-size", "300", "--max-steps", "3", "--eval-every", "2"]
        assert train.main(argv) == 0
    return folder


def test_runs_are_listed(two_runs, monkeypatch, capsys):
    monkeypatch.chdir(two_runs)
    (two_runs / "runs/first/metrics.jsonl").open("a").write('5\n{}\n{"step": 4, "torn')
    assert runs.main(["--csv"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("run,state,parameters,data,steps,loss")
    assert {line.split(",")[0] for line in lines} == {"runs/first", "runs/second"}
    assert all(line.split(",")[1] == "all steps done" for line in lines)
    row = dict(zip(head.split(","), lines[0].split(","), strict=True))
    assert int(row["parameters"]) > 1000
    assert datetime.fromisoformat(row["when"]).tzinfo is not None
    best = min(m["bits_per_byte"] for m in run_files.metrics(Path(row["run"])) if "val_loss" in m)
    assert float(row["best bits per byte"]) == best
    assert runs.main([]) == 0
    assert "runs/second" in capsys.readouterr().out
    stored = two_runs / "runs/first/settings.json"
    text = stored.read_text()
    stored.write_text(text.replace('"max_steps": 3', '"max_steps": 9'))  # as a resumed run has it
    assert run_files.state(two_runs / "runs/first") == "can be resumed"
    stored.write_text("[1]")
    capsys.readouterr()
    assert runs.main(["--csv"]) == 0  # the other run is still listed
    _, *lines = capsys.readouterr().out.splitlines()
    states = {line.split(",")[0]: line.split(",")[1] for line in lines}
    assert states["runs/second"] == "all steps done"
    assert "settings.json: damaged (expected an object)" in states["runs/first"]
    stored.write_text(text)
    with run_lock.lock(two_runs / "runs/first" / run_lock.TRAINING, "busy"):
        assert run_files.state(two_runs / "runs/first") == "in training"


def test_curves_of_short_runs_begin_at_their_first_step():
    assert recent_means([4.0, 2.0, 3.0]) == [4.0, 3.0, 3.0]
    assert recent_means([9.0, *[1.0] * 50])[-1] == 1.0  # the first is 51 steps back


def test_two_runs_are_compared(two_runs, monkeypatch, capsys):
    monkeypatch.chdir(two_runs)
    stored = two_runs / "runs/second/settings.json"
    stored.write_text(stored.read_text().replace('"resume": false', '"resume": true'))
    assert runs.main(["--compare", "runs/first", "runs/second"]) == 0
    said = capsys.readouterr()
    out = said.out
    assert "0.002" in out
    assert "resume" not in out  # how the last start was made is no setting of the run
    assert "d_model" not in out  # the same in both
    assert (two_runs / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "tokenizers" not in said.err
    # the name of a run in runs/ is enough, and another tokenizer is mentioned
    shutil.copytree(two_runs / "runs/second", two_runs / "runs/third")
    data = two_runs / "runs/third/settings.json"
    data.write_text(data.read_text().replace("snakes.txt", "other.txt"))
    (two_runs / "runs/third/last/tokenizer.json").write_text("{}")
    assert runs.main(["--compare", "first", "third"]) == 0
    said = capsys.readouterr()
    assert "nats per token cannot be compared, so the picture has bits per byte" in said.err
    assert [line.split()[0] for line in said.out.splitlines()].count("data") == 1
    shutil.rmtree(two_runs / "runs/third")
    with pytest.raises(InputError, match="--compare: expected two different runs"):
        runs.main(["--compare", "runs/first", "runs/../runs/first"])
    with pytest.raises(InputError, match="not a run"):
        runs.main(["--compare", "runs/first", "runs/third"])


def test_an_older_run_is_compared_by_what_it_trained_with(here, capsys):
    for name, values in (("old", {}), ("new", {"momentum": 0.9, "beta2": None})):
        (here / name).mkdir()
        text = json.dumps({"optimizer": "muon", "data": [], "max_steps": 1, "seed": 0} | values)
        (here / name / "settings.json").write_text(text)
    rows = runs.comparison(here / "old", here / "new", runs.as_text)
    assert ["momentum", "0.95", "0.9"] in rows
    assert ["beta2", "0.95", "0.99"] in rows


def test_no_runs(here):
    with pytest.raises(InputError, match="no run there yet"):
        runs.main([])


# The doctor


def test_doctor_here(capsys):
    assert doctor.main(["--no-test"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert "CPU: eager" in out


def test_doctor_names_no_user(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USERPROFILE", "/home/alice")
    monkeypatch.setattr(shutil, "which", lambda name: f"/home/alice/bin/{name}")
    doctor.show(cli.console(), "machine", doctor.machine() | {"cache": "/home/alice/.cache/x"})
    out = capsys.readouterr().out
    assert "alice" not in out
    assert "C compiler: cc\n" in out
    assert "cache: ~/.cache/x\n" in out


def test_doctor_names_a_second_copy_of_the_operators(monkeypatch):
    assert doctor.ALONE not in doctor.packages()
    real = doctor.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda name: "0.0.1" if name == doctor.ALONE else real(name)
    )
    assert "pip uninstall ysnake-kernels" in doctor.packages()[doctor.ALONE]


def test_self_test(monkeypatch):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    found = doctor.self_test()
    assert found["operators against the reference"].startswith("right")
    assert not [value for value in found.values() if "not known" in value]


def test_a_self_test_that_cannot_run_fails(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("no such kernel")

    for name in ("operators", "products", "training", "writing"):
        monkeypatch.setattr(doctor, name, broken if name == "operators" else lambda *_: "fast")
    assert doctor.main([]) == 1
    assert "not known (RuntimeError: no such kernel)" in capsys.readouterr().out


class Card:
    name, total_memory, major, minor, multi_processor_count = "A card", 8e9, 9, 0, 132


MACHINES = {
    "CUDA": {"triton": True, "compiler": "/usr/bin/cc", "gpu": True, "says": "Triton is installed"},
    "no compiler": {"triton": True, "compiler": None, "gpu": True, "says": "which is missing"},
    "no Triton": {"triton": False, "compiler": None, "gpu": True, "says": "slow"},
    "macOS": {"triton": False, "compiler": None, "gpu": False, "says": "C compiler: none"},
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_doctor_elsewhere(monkeypatch, capsys, machine):
    """What it asks is answered as other machines answer."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: find_spec(name) if machine["triton"] or name != "triton" else None,
    )
    monkeypatch.setattr(shutil, "which", lambda name: machine["compiler"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["gpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    if not machine["gpu"]:
        monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor.main(["--no-test"]) == 0
    out = capsys.readouterr().out
    assert machine["says"] in out
    assert ("sm_90" in out) == machine["gpu"]
