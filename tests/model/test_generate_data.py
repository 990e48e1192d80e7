"""A corpus by Ollama: a real server on a real socket that speaks Ollama's API, as well or as badly
as a test tells it to; the real client; real processes, some of them killed."""

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
from small import environment, python

from ysnake import generate_data as generator
from ysnake.data_generation import document_store, questions
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.text import data, prose

MODEL = "llama3.1"
VOCABULARY = questions.lines("words")


def document(prompt, words=60):
    """A document of its own for each prompt, in two paragraphs."""
    chosen = random.Random(prompt).choices(VOCABULARY, k=words)
    text = [" ".join(half).capitalize() + "." for half in (chosen[: words // 2], chosen[30:])]
    return "\n\n".join(text)


class Server(ThreadingHTTPServer):
    """An Ollama that has one model and answers `answer(prompt)`, unless `faults` says otherwise.

    `faults` are used up, one a request: a status, `reset` (the connection breaks in mid-stream),
    `end` (the stream ends in its middle), `error` (the stream says that it failed) or `leave` (this
    answer is the last).
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = document
        self.reason = "stop"
        self.faults = []
        self.models = {MODEL}
        self.pulls = True
        self.tags = None  # what /api/tags says instead of the models
        self.asked = []  # bodies of /api/generate
        self.together = None  # a barrier that requests meet at
        self.pace = 0.0  # seconds between the pieces of an answer

    @property
    def host(self):
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that goes away is no error of ours."""

    def prompts(self):
        return [body["prompt"] for body in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        assert self.path == "/api/tags"
        models = [{"model": f"{model}:latest"} for model in sorted(self.server.models)]
        self.whole(200, {"models": models} if self.server.tags is None else self.server.tags)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if body["model"] not in server.models and self.path != "/api/pull":
            self.whole(404, {"error": f"model '{body['model']}' not found"})
        elif self.path == "/api/show":
            self.whole(200, {"details": {}, "model_info": {}})
        elif self.path == "/api/pull":
            self.pull(body)
        else:
            self.generate(body)

    def pull(self, body):
        self.begin()
        if self.server.pulls:
            self.piece({"status": "pulling", "digest": "x", "total": 100, "completed": 50})
            self.server.models.add(body["model"])
            self.piece({"status": "success"})
        else:
            self.piece({"error": "pull model manifest: file does not exist"})
        self.wfile.write(b"0\r\n\r\n")

    def generate(self, body):
        server = self.server
        server.asked.append(body)
        if server.together:
            server.together.wait(20)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.whole(fault, {"error": "[/b] is wrong"})
            return
        if fault == "leave":
            server.shutdown()
            server.server_close()
            self.close_connection, fault = True, None
        self.begin()
        words = re.split(r"(?<=\s)", server.answer(body["prompt"]))
        size = max(1, len(words) // 4)
        pieces = ["".join(words[i : i + size]) for i in range(0, len(words), size)]
        for piece in pieces[: len(pieces) // 2 if fault else None]:
            self.piece({"model": MODEL, "response": piece, "done": False})
            time.sleep(server.pace)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "error":
            self.piece({"error": "an error was encountered while running the model"})
        elif fault is None:
            self.piece({"response": "", "done": True, "done_reason": server.reason})
        self.wfile.write(b"0\r\n\r\n")

    def whole(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def begin(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def piece(self, part):
        line = json.dumps(part).encode() + b"\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.shutdown()


def settings(server):
    host = server if isinstance(server, str) else server.host
    return environment() | {"OLLAMA_HOST": host, "NO_PROXY": "*"}


def apart(server, folder, *options):
    """Run the command in a process of its own, in `folder`."""
    return python("ysnake.generate_data", *options, cwd=folder, env=settings(server))


def generate(server, folder, *options):
    """Run the command in this process, which is quicker."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        for name, value in settings(server).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["generate_data", *options])
        patch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            cli.run(generator.main)
    return subprocess.CompletedProcess(options, ended.value.code, out.getvalue(), err.getvalue())


def start(server, folder, *options, **streams):
    command = [sys.executable, "-m", "ysnake.generate_data", *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
    return subprocess.Popen(command, cwd=folder, env=settings(server), text=True, **streams)


def documents(folder, kind="words"):
    """The documents of a kind, as training reads them."""
    path = folder / "corpus" / f"{kind}.txt"
    return [text for text, _ in data.read_file(path)] if path.exists() else []


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_lists_are_clean():
    sizes = {"words": 1500, "topics": 1200, "dates": 366}
    for kind, least in sizes.items():
        text = (questions.LISTS / f"{kind}.txt").read_text(encoding="utf-8")
        entries = text.splitlines()
        assert text.endswith("\n")
        assert len(entries) >= least
        assert len({entry.casefold() for entry in entries}) == len(entries)
        assert all(entry and entry == " ".join(entry.split()) for entry in entries)
        assert not any(set("{}") & set(entry) for entry in entries)
        prompts = questions.lines(f"{kind}_prompts")
        assert len(set(prompts)) == len(prompts) >= 5
        assert all(prompt.count("{}") == 1 and prompt.format("x") for prompt in prompts)
    assert len(questions.lines("dates")) == 366
    assert questions.lines("dates")[0] == "1 January"
    assert questions.lines("dates")[59:61] == ["29 February", "1 March"]
    assert questions.lines("dates")[-1] == "31 December"
    words = questions.lines("words")
    assert words == sorted(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)
    topics = questions.lines("topics")
    assert topics == sorted(topics, key=lambda topic: (topic.casefold(), topic))


@pytest.mark.parametrize("kind", questions.KINDS)
def test_what_is_asked_is_a_function_of_the_seed(kind):
    asked = list(questions.tasks(kind, 3))
    entries, prompts = questions.lines(kind), questions.lines(f"{kind}_prompts")
    assert asked == list(questions.tasks(kind, 3)) != list(questions.tasks(kind, 4))
    assert len(set(asked)) == len(asked) == len(entries) * len(prompts)
    for turn in range(0, len(asked), len(entries)):  # a turn asks about everything once
        assert {task.entry for task in asked[turn : turn + len(entries)]} == set(entries)
    assert len({task.prompt for task in asked[:100]}) == len(prompts)


def test_a_corpus(server, tmp_path):
    server.together = threading.Barrier(3)  # nobody is answered until three are asking
    done = apart(server, tmp_path, "--count", "4", "--parallel", "3")
    server.together = None
    assert done.returncode == 0, done.stderr
    assert "words.txt: 4 of 4 documents, 240 words" in done.stdout
    assert done.stdout.endswith("next: python -m ysnake.train --data corpus\n")
    files = data.find_files([tmp_path / "corpus"])
    assert [path.name for path in files] == ["dates.txt", "topics.txt", "words.txt"]
    prompts = server.prompts()
    read = [text for text, ends in data.Corpus(files).pieces()]
    assert sorted(read) == sorted(document(prompt) for prompt in prompts)
    for kind in questions.KINDS:
        some = [t.format("x")[:9] for t in questions.lines(f"{kind}_prompts")]
        assert sum(prompt[:9] in some for prompt in prompts) >= 4
    assert all(body["options"]["temperature"] == 0.8 for body in server.asked)
    assert len({body["options"]["seed"] for body in server.asked}) == 12

    # what is there is left alone; a larger count goes on behind it, and asks nothing twice
    before = {path: path.read_bytes() for path in files}
    assert generate(server, tmp_path, "--count", "4").returncode == 0
    assert len(server.asked) == 12
    assert before == {path: path.read_bytes() for path in files}
    assert generate(server, tmp_path, "--count", "6", "--seed", "1").returncode == 0
    assert len(set(server.prompts())) == len(server.asked) == 18
    for path, content in before.items():
        assert path.read_bytes().startswith(content + b"<|endoftext|>\n")
        assert len(documents(tmp_path, path.stem)) == 6

    # another folder is asked the same for
    asked = [(body["prompt"], body["options"]["seed"]) for body in server.asked[:12]]
    server.asked.clear()
    done = generate(server, tmp_path, "--count", "4", "--parallel", "1", "--out", "other")
    assert sorted(asked) == sorted((b["prompt"], b["options"]["seed"]) for b in server.asked)


def test_the_next_command_can_be_pasted(server, tmp_path):
    options = ("--kinds", "words", "--count", "1", "--out", "my corpus")
    done = generate(server, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[-2:] == ["--data", "my corpus"]


def test_killed_and_started_again(server, tmp_path):
    server.pace = 0.01
    command = ("--kinds", "words", "--count", "40", "--parallel", "3")
    seen = []
    for kept in (3, 9, 20):
        process = start(server, tmp_path, *command)
        wait_until(lambda n=kept: len(documents(tmp_path)) >= n)
        process.kill()
        assert process.wait(20) != 0
        process.stdout.close()
        now = documents(tmp_path)
        assert now[: len(seen)] == seen
        seen = now
    done = generate(server, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    final = documents(tmp_path)
    assert final[: len(seen)] == seen
    assert len(set(final)) == len(final) == 40
    answers = {document(prompt) for prompt in server.prompts()}
    assert answers >= set(final)
    entries = [json.loads(line)["entry"] for line in ledger(tmp_path).read_text().splitlines()]
    assert len(set(entries)) == len(entries) == 40
    # what was asked twice is what was on its way when a process was killed
    assert len(server.asked) - len(set(server.prompts())) <= 3 * 3


@pytest.mark.slow
def test_our_own_server_writes_a_corpus_to_train_on(tmp_path):
    """A trained model behind a real server, killed and started again in the middle: minutes."""
    done = python("ysnake.train", "--run", "run", cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "ysnake.serve", "run", "--port", "0", "--name", "snake"]
    serving = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        host = re.search(r"http://(\S+)", serving.stdout.readline())[1]
        options = ["--model", "snake", "--kinds", "words", "--count", "8", "--max-tokens", "150"]
        options += ["--min-words", "20", "--temperature", "1.0"]
        process = start(host, tmp_path, *options)
        wait_until(lambda: len(documents(tmp_path)) >= 3)
        process.kill()
        process.communicate()
        seen = documents(tmp_path)
        done = apart(host, tmp_path, *options)
        assert done.returncode == 0, done.stderr
    finally:
        serving.kill()
        serving.communicate()
    final = documents(tmp_path)
    assert final[: len(seen)] == seen
    assert len(set(final)) == len(final) == 8
    sizes = ["--seq-len", "32", "--batch-size", "2", "--max-steps", "20", "--run", "again"]
    done = python("ysnake.train", "--data", "corpus", *sizes, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


def ledger(folder, kind="words"):
    return folder / "corpus" / f".{kind}.jsonl"


def store(folder):
    folder.mkdir(exist_ok=True)
    return document_store.DocumentStore(folder, "words", 10, 0)


def test_a_kill_while_a_document_is_written_loses_no_other(tmp_path, monkeypatch):
    """Killed after every 20th byte that the third document writes: the first two stay, and the
    third is either whole or asked for again."""
    asked = list(islice(questions.tasks("words", 0), 4))
    texts = [document(task.entry) for task in asked[:3]]
    opened = store(tmp_path / "corpus")
    for task, text in zip(asked[:2], texts, strict=False):
        opened.add(task, text, False, 40)
    before = {path: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    writes = []
    monkeypatch.setattr(document_store, "append", lambda file, data, _: writes.append((file, data)))
    opened.add(asked[2], texts[2], False, 40)
    monkeypatch.undo()
    opened.close()
    names = [Path(file.name).name for file, _ in writes]
    assert names == [".words.jsonl", "words.txt", ".words.jsonl"]
    states = [before]
    for file, written in writes:
        path, last = Path(file.name), states[-1]
        cuts = [*range(1, len(written), 20), len(written) - 1, len(written)]
        states += [last | {path: last[path] + written[:n]} for n in cuts]
    for state in states:
        for path, content in state.items():
            path.write_bytes(content)
        reopened = store(tmp_path / "corpus")
        whole = state[reopened.path] == states[-1][reopened.path]
        assert documents(tmp_path) == texts[: 3 if whole else 2]
        assert next(reopened.tasks) == asked[3 if whole else 2]
        reopened.close()


def test_an_answer_that_does_not_fit_on_the_disk_leaves_no_trace(tmp_path):
    resource = pytest.importorskip("resource", reason="Windows has no limit to a file's size")
    first, large, last = islice(questions.tasks("words", 0), 3)
    opened = store(tmp_path / "corpus")
    opened.add(first, document(first.entry), False, 40)
    before = ledger(tmp_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"words\.txt: File too large"):
            opened.add(large, document(large.entry) * 100, False, 40)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ledger(tmp_path).read_bytes() == before
    opened.add(last, document(last.entry), False, 40)  # another answer, on its way meanwhile
    opened.close()
    reopened = store(tmp_path / "corpus")
    assert documents(tmp_path) == [document(first.entry), document(last.entry)]
    assert next(reopened.tasks) == large
    reopened.close()


def test_a_file_of_another_hand_is_left_alone(tmp_path):
    (tmp_path / "words.txt").write_text("my own words\n")
    with pytest.raises(InputError, match=r"words\.txt: expected 0 bytes.*got 13"):
        store(tmp_path)
    assert (tmp_path / "words.txt").read_text() == "my own words\n"


@pytest.mark.parametrize(("start", "end"), [(0, -1), (0, -20), (3, None)])
def test_a_file_that_another_hand_has_shortened_is_left_alone(tmp_path, start, end):
    """It does not look like a document that a killed process wrote in part."""
    opened = store(tmp_path)
    for name in "ab":
        opened.add(questions.Task(name, 0), document(name), False, 5)
    opened.close()
    (tmp_path / "words.txt").write_bytes((tmp_path / "words.txt").read_bytes()[start:end])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"words\.txt: expected \d+ bytes"):
        store(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_damaged_ledger_is_named(tmp_path):
    (tmp_path / ".words.jsonl").write_text("{}}\n")
    with pytest.raises(
        InputError, match=r"words\.txt: .*\.words\.jsonl, the list of its questions, is"
    ):
        store(tmp_path)


ANSWER = {"entry": "boa", "prompt": 0, "verdict": "kept", "at": 0, "bytes": 13}


@pytest.mark.parametrize(
    "records",
    [
        [5],
        [ANSWER | {"prompt": True}],
        [ANSWER | {"entry": None}],
        [ANSWER | {"verdict": "liked"}],
        [ANSWER | {"verdict": ["kept"]}],
        [ANSWER | {"at": -1}],
        [ANSWER | {"at": 5}],
        [ANSWER | {"bytes": 0}],
        [ANSWER | {"bytes": 13.0}],
        [ANSWER | {"bytes": "13"}],
        [ANSWER | {"bytes": 6}, ANSWER | {"at": 4, "bytes": 10**30}],
        [ANSWER, {"entry": "adder"}],
    ],
)
def test_a_ledger_of_another_hand_is_refused(tmp_path, records):
    """And neither file is changed, though the last line of the ledger has no end."""
    text = "".join(json.dumps(record) + "\n" for record in records) + "torn"
    (tmp_path / ".words.jsonl").write_text(text)
    (tmp_path / "words.txt").write_text("my own words\n")
    with pytest.raises(
        InputError, match=r"words\.txt: .*\.words\.jsonl, the list of its questions, is"
    ):
        store(tmp_path)
    assert (tmp_path / ".words.jsonl").read_text() == text
    assert (tmp_path / "words.txt").read_text() == "my own words\n"


def test_one_process_at_a_time(tmp_path):
    opened = store(tmp_path)
    with pytest.raises(InputError, match=r"words\.txt: another process is writing it"):
        store(tmp_path)
    opened.close()
    store(tmp_path).close()


@pytest.mark.usefixtures("without_locks")
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, caplog):
    for _ in range(2):
        store(tmp_path).close()
    assert caplog.text.count("this file system has no locks") == 1
    assert str(tmp_path) in caplog.text


def test_what_is_dropped(server, tmp_path):
    good = document("good")
    words = document("near").split()
    near = " ".join(w if i % 15 else "changed" for i, w in enumerate(words, 1))
    answers = [
        good,
        "I'm sorry, but I can't write about that. " + document("x"),
        "A short answer.",
        good.upper(),
        " ".join(words),
        near,
        "As an AI language model, I have no birthday. " + document("y"),
        document("last"),
    ]
    server.answer = lambda prompt: answers[len(server.asked) - 1]
    done = generate(
        server, tmp_path, "--kinds", "topics", "--count", "3", "--parallel", "1", "--seed", "9"
    )
    assert done.returncode == 0, done.stderr
    dropped = "dropped: 2 as refusal, 1 as stub, 1 as duplicate, 1 as near duplicate"
    assert dropped in done.stdout
    assert documents(tmp_path, "topics") == [good, " ".join(words), document("last")]
    # dropped answers are not asked for again
    server.answer = document
    assert generate(server, tmp_path, "--kinds", "topics", "--count", "4").returncode == 0
    assert len(server.asked) == len(set(server.prompts())) == 9


def test_nothing_left_to_ask(server, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "LISTS", tmp_path)
    (tmp_path / "dates.txt").write_text("1 January\n2 January\n")
    (tmp_path / "dates_prompts.txt").write_text("What happened on {}?\nWho was born on {}?\n")
    done = generate(server, tmp_path, "--kinds", "dates", "--count", "9")
    assert done.returncode == 0, done.stderr
    assert "dates.txt: 4 of 9 documents" in done.stdout
    assert "there are no more" in done.stdout
    assert len(set(server.prompts())) == len(server.asked) == 4


def test_an_answer_at_the_limit_ends_with_its_last_sentence(server, tmp_path):
    server.reason = "length"
    server.answer = lambda prompt: document(prompt) + " And then the"
    done = generate(server, tmp_path, "--kinds", "dates", "--count", "1", "--max-tokens", "90")
    assert done.returncode == 0, done.stderr
    assert server.asked[0]["options"]["num_predict"] == 90
    assert documents(tmp_path, "dates") == [document(server.prompts()[0])]


def test_half_a_surrogate_pair_in_an_answer_becomes_a_question_mark(server, tmp_path):
    server.answer = lambda prompt: document(prompt) + " It is \ud83d night."
    done = generate(server, tmp_path, "--kinds", "words", "--count", "1", "--parallel", "1")
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path)[0].endswith(". It is ? night.")


def test_a_thought_that_is_cut_at_the_limit_is_not_kept(tmp_path):
    """A model whose template opens a thought: only its whole answers show where it ends."""
    (tmp_path / "corpus").mkdir()
    one = store(tmp_path / "corpus")
    whole, cut = document("copper"), document("tin")
    one.add(questions.Task("a", 0), f"The user wants copper.</think>{whole}", False, 5)
    one.close()
    one = store(tmp_path / "corpus")  # the ledger remembers it
    one.add(questions.Task("b", 0), f"The user wants tin. {document('thought')}", True, 5)
    one.add(questions.Task("c", 0), f"The user wants tin.</think>{cut} And", True, 5)
    one.close()
    assert documents(tmp_path) == [whole, cut]
    assert one.counts["stub"] == 1


def test_a_server_that_recovers(server, tmp_path):
    server.faults = [500, 503]
    done = generate(server, tmp_path, "--kinds", "words", "--count", "2", "--parallel", "1")
    assert done.returncode == 0, done.stderr
    said = f"{server.host}: answered 500: [/b] is wrong; trying again in 0.5 s"
    assert said in done.stdout
    assert "answered 503" in done.stdout
    assert "trying again in 1 s" in done.stdout
    assert len(documents(tmp_path)) == 2
    assert server.prompts()[0] == server.prompts()[1] == server.prompts()[2]


@pytest.mark.parametrize("fault", ["reset", "end", "error"])
def test_a_server_that_breaks_off(server, tmp_path, fault):
    server.faults = [None, None, fault, fault]
    command = ("--kinds", "words", "--count", "5", "--parallel", "1", "--retries", "1")
    done = apart(server, tmp_path, *command)
    assert done.returncode == 1
    assert f"error: {server.host}: broke off in the middle of an answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "2 of 5 documents" in done.stdout
    assert "The same command continues from here." in done.stdout
    assert documents(tmp_path) == [document(prompt) for prompt in server.prompts()[:2]]
    assert (tmp_path / "corpus/words.txt").read_text().endswith(".\n")
    done = generate(server, tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert len(set(documents(tmp_path))) == 5


def test_a_dead_port(tmp_path):
    with Server() as dead:
        host = dead.host
    done = apart(host, tmp_path)
    assert done.returncode == 1
    assert f"error: no Ollama server answers at {host}; start it with `ollama serve`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_goes_away(server, tmp_path):
    server.faults = [None, "leave"]
    command = ("--kinds", "words", "--count", "4", "--parallel", "1", "--retries", "1")
    done = generate(server, tmp_path, *command)
    assert done.returncode == 1
    assert "trying again in 0.5 s" in done.stdout
    assert f"error: no Ollama server answers at {server.host}; start it" in done.stderr
    assert documents(tmp_path) == [document(prompt) for prompt in server.prompts()]
    assert len(server.asked) == 2


@pytest.mark.parametrize("reply", [{"version": 1}, []])
def test_something_else_at_the_port(server, tmp_path, reply):
    server.tags = reply
    done = generate(server, tmp_path)
    assert done.returncode == 1
    assert f"error: {server.host}: does not answer as Ollama does" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_model(server, tmp_path):
    command = ("--model", "tiny", "--kinds", "words", "--count", "1")
    done = apart(server, tmp_path, *command)
    assert done.returncode == 2
    assert f"--model: tiny is not pulled at {server.host} (there: {MODEL}:latest)" in done.stderr
    assert "`ollama pull tiny` or --pull" in done.stderr
    assert list(tmp_path.iterdir()) == []
    server.pulls = False
    done = generate(server, tmp_path, *command, "--pull")
    assert done.returncode == 2
    assert "cannot pull tiny: pull model manifest: file does not exist" in done.stderr
    server.pulls = True
    done = generate(server, tmp_path, *command, "--pull")
    assert done.returncode == 0, done.stderr
    assert "tiny" in server.models
    assert len(documents(tmp_path)) == 1


@pytest.mark.parametrize(("reply", "code"), [("y\n", 0), ("\x04", 2)])
def test_on_a_terminal_it_asks(server, tmp_path, reply, code):
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    leader, follower = pty.openpty()
    process = start(
        server,
        tmp_path,
        *("--model", "tiny", "--kinds", "words", "--count", "1"),
        **dict.fromkeys(("stdin", "stdout", "stderr"), follower),
    )
    os.close(follower)
    said = ""
    while "Pull it now?" not in said:
        said += os.read(leader, 4096).decode()
    os.write(leader, reply.encode())
    try:
        while piece := os.read(leader, 4096):
            said += piece.decode()
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(20) == code
    assert ("tiny" in server.models) == (code == 0)
    assert len(documents(tmp_path)) == (code == 0)


def test_interrupted(server, tmp_path):
    server.pace = 0.02
    process = start(server, tmp_path, "--count", "300", "--parallel", "2")
    wait_until(lambda: len(documents(tmp_path)) >= 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "The same command continues from here." in said
    assert "Traceback" not in said
    answers = {document(prompt) for prompt in server.prompts()}
    assert all(text in answers for kind in questions.KINDS for text in documents(tmp_path, kind))


def test_a_bad_host(tmp_path):
    for run, host in ((apart, "here:there"), (generate, "here:there"), (generate, "ftp://here")):
        done = run(host, tmp_path)
        assert done.returncode == 2
        assert done.stderr == f"error: OLLAMA_HOST: expected HOST:PORT, got '{host}'\n"


ORE = "Copper is a red metal that people learnt to melt long ago."
PLAIN = {
    "prose": (f"{ORE}\n\n{ORE}", f"{ORE}\n\n{ORE}"),
    "wrapped": (
        "Copper is a red\nmetal  that\npeople like.",
        "Copper is a red metal that people like.",
    ),
    "headings": (
        f"# Copper\n\n{ORE}\n\n## Its uses\n{ORE}\n\n**Summary**\n\n{ORE}",
        "\n\n".join([ORE] * 3),
    ),
    "title": (f"The Red Metal\n\n{ORE}", ORE),
    "underlined": (f"{ORE}\n---\n{ORE}", f"{ORE}\n\n{ORE}"),
    "emphasis": (
        "A **bold** and *soft* `word`, __so__ [linked](http://x.y) it_is_not.",
        "A bold and soft word, so linked it_is_not.",
    ),
    "short items": (
        "There are three:\n\n* copper\n* tin;\n* lead",
        "There are three: copper, tin, lead.",
    ),
    "items": (
        f"{ORE}\n1. **Use:** Wires are made of it\n2. It conducts.\n\n{ORE}",
        f"{ORE}\n\nUse: Wires are made of it. It conducts.\n\n{ORE}",
    ),
    "nested": (
        "The metals are:\n* red\n  * copper\n* grey\n  * tin",
        "The metals are: red, copper, grey, tin.",
    ),
    "years": (
        "1804. That was the year of the new state of Haiti.",
        "1804. That was the year of the new state of Haiti.",
    ),
    "table": (f"{ORE}\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{ORE}", f"{ORE}\n\n{ORE}"),
    "code": (f"{ORE}\n```\nx = 1\n```", ORE),
    "quote": (f"> {ORE}", ORE),
    "indented": (f"    {ORE}", ORE),
    "chatter": (f"Sure! Here is a short text about copper:\n\n{ORE}", ORE),
    "more chatter": (f"Certainly, here's the usage note you asked for: {ORE}", ORE),
    "happy": (f"Of course! I'd be happy to help. Here you have it, a bit on copper:\n\n{ORE}", ORE),
    "farewell": (f"{ORE}\n\nLet me know if you\u2019d like more!\n\n(Word count: 120 words)", ORE),
    "no chatter": (f"Of course the sea is salt. {ORE}", f"Of course the sea is salt. {ORE}"),
    "here": (
        "Here is the harbour where they landed: a beach.",
        "Here is the harbour where they landed: a beach.",
    ),
    "thoughts": (f"<think>\nWhat is copper?\n</think>\n\n{ORE}", ORE),
    "thoughts that never end": ("</think>" + "<think>" * 20_000 + ORE, ""),  # in little time
    "unfinished thoughts": ("<think>\nWhat is copper?", ""),
    "thoughts twice": (f"<think>a</think>\n{ORE}\n<think>b</think>", ORE),
    "thoughts in thoughts": (f"<think>a<think>b</think>c</think>{ORE}", ORE),
    "closed only": (f"Copper is what they want. I should say more.\n</think>\n\n{ORE}", ORE),
    "closed only, in a line": (f"Copper is what they want.</THINK>{ORE}", ORE),
    "thinking": (f"<thinking>Copper.</thinking>{ORE}", ORE),
    "reasoning": (f"<reasoning>\nCopper.\n</reasoning>\n{ORE}", ORE),
    "thought": (f'<thought kind="long">Copper.</thought>{ORE}', ORE),
    "namespace": (f"<seed:think>Copper.</seed:think>{ORE}", ORE),
    "brackets": (f"[THINK]Copper.[/THINK]{ORE}", ORE),
    "brackets closed only": (f"Copper.[/THINK]{ORE}", ORE),
    "brackets in prose": ("I [think] that is all there is.", "I [think] that is all there is."),
    "triangles": (f"◁think▷Copper.◁/think▷{ORE}", ORE),
    "bars": (f"<|START_THINKING|>Copper.<|END_THINKING|><|START_RESPONSE|>{ORE}", ORE),
    "channels": (
        "<|channel|>analysis<|message|>Copper.<|end|><|start|>assistant<|channel|>commentary"
        f"<|message|>More.<|end|><|start|>assistant<|channel|>final<|message|>{ORE}<|return|>",
        ORE,
    ),
    "channels, first marker missing": (f"Copper.<|end|><|channel|>final<|message|>{ORE}", ORE),
    "channels, unfinished": ("<|channel|>analysis<|message|>Copper is a metal I know of.", ""),
    "channels without markers": (f"analysisCopper is wanted.assistantfinal{ORE}", ORE),
    "other channels": (f"<|channel>thought\nCopper is wanted.<channel|>{ORE}<turn|>", ORE),
    "process": (f"Here is my thought process:\nCopper.\n\nHere is my response:\n{ORE}", ORE),
    "answer": (f"<think>Copper.</think><answer>{ORE}</answer>", ORE),
    "end of turn": (f"{ORE}<|im_end|>", ORE),
    "other ends of turns": (f"{ORE}</s><|eot_id|><end_of_turn><\uff5cend▁of▁sentence\uff5c>", ORE),
    "whole turn": (f"<|im_start|>assistant\n{ORE}<|im_end|>\n", ORE),
    "invented turn": (f"{ORE}<|im_end|>\n<|im_start|>user\nAnd what is tin?<|im_end|>", ORE),
    "end of text": (f"{ORE}<|endoftext|>{ORE}", f"{ORE}\n\n{ORE}"),
    "entities": (
        "Salt &amp; <b>pepper</b> at 5 < 6, *that is all.",
        "Salt & <b>pepper</b> at 5 < 6, *that is all.",
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_markdown_and_small_talk_become_prose(case):
    answer, expected = PLAIN[case]
    assert prose.plain(answer) == expected


CUT = {
    "prose": (f"{ORE}\n\n{ORE} And then the", f"{ORE}\n\n{ORE}"),
    "whole": (f"{ORE}\n\n{ORE}", f"{ORE}\n\n{ORE}"),
    "item": (
        "It has several uses.\n\n- Wires are made of it.\n- Pipes of it carry wat",
        "It has several uses.\n\nWires are made of it.",
    ),
    "first item": (f"{ORE} It has uses:\n1. Wires are", ORE),
    "short items": (f"{ORE} There are three:\n\n1. copper\n2. tin\n3. le", ORE),
    "heading": (f"{ORE}\n\n## 2. Its u", ORE),
    "thought": ("<think>\nCopper is wanted. I should", ""),
    "after a thought": (f"Copper is wanted. I know it.</think>{ORE} And", ORE),
    "farewell": (f"{ORE}\n\nLet me know if you'd like mo", ORE),
}


@pytest.mark.parametrize("case", CUT)
def test_of_an_answer_that_is_cut_whole_sentences_become_prose(case):
    answer, expected = CUT[case]
    assert prose.plain(answer, cut=True) == expected


def test_refusals():
    for text in (
        "I can't help with that.",
        "I\u2019m sorry, but I don't have enough information.",
        "Sorry, I cannot do this.",
        "Unfortunately, I was unable to find an event on this day.",
        "As an AI, I have no opinion.",
        "The word is nice. As a large language model, I cannot feel it.",
        "I could not find anything.",
        "I couldn't independently verify an event on this day.",
        "I don't have access to newspapers.",
        "I do not have enough reliable information on this topic.",
        "I don't actually have personal feelings.",
    ):
        assert prose.is_refusal(text), text
    for text in (
        '"I can\'t find the oar," said Ada.',
        "Sorry is the hardest word.",
        "Unfortunately the bridge fell.",
        "An AI model learns from examples.",
        "As an aide, I was told nothing.",
        "I Ching is an old book.",
        "I couldn\u2019t sleep, so I went down to the harbour and watched the boats come in.",
        "I could not help laughing at the word.",
        "I don't have a penny left, thought Ada, and that is what the word poor means here.",
    ):
        assert not prose.is_refusal(text), text


def test_whole_sentences():
    assert prose.whole_sentences('He said "No." And then 3.5 m') == 'He said "No."'
    assert prose.whole_sentences("no end") == ""
    assert prose.whole_sentences("One! Two?") == "One! Two?"
    assert prose.whole_sentences("Two metals.\n1. tin\n 2. lead") == "Two metals."
    assert prose.whole_sentences("It was 1804.\nThen") == "It was 1804."


def test_near_duplicates_are_known_by_their_words_in_a_row():
    seen = prose.Seen()
    texts = [document(str(i), 200) for i in range(20)]
    for text in texts:
        assert seen.verdict(text) is None
        seen.add(text)
    words = texts[7].split()
    assert seen.verdict("  ".join(words).lower().replace(".", ",")) == "duplicate"
    for every, verdict in {8: "near duplicate", 2: None}.items():
        changed = [w if i % every else "new" for i, w in enumerate(words)]
        assert seen.verdict(" ".join(changed)) == verdict
    assert seen.verdict(" ".join(words[50:100])) == "near duplicate"
    assert seen.verdict(texts[3] + document("more", 300)) == "near duplicate"
    random.Random(0).shuffle(words)
    assert seen.verdict(" ".join(words)) is None
    assert seen.verdict("") is None
