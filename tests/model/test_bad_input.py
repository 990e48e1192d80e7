"""The list of bad inputs of every command: each ends with one line that names it, and no traceback.

The operators' list is in tests/kernels/test_bad_arguments.py; damaged files are in test_damage.py,
and those made to attack in test_attacks.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import TINY, entry, model, python, saved

from ysnake import evaluate, export, generate_data, run, serve, train, watch
from ysnake.checkpoints import checkpoint
from ysnake.inference.generate import Context
from ysnake.text import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a run, and all kinds of files that are not what is asked for."""
    folder = tmp_path_factory.mktemp("wrong")
    saved(folder)
    checkpoint.save(
        folder / "words", model(vocab=15), tokenizer.train("word", ["The boa sleeps."], 300)
    )
    (folder / "empty").mkdir()
    (folder / "there").mkdir()
    for name, content in {
        "binary.txt": b"\x00\x01\x02" * 100,
        "latin.txt": b"na\xefve \xff",
        "nothing.txt": b"\n\n",
        "wide.txt": "wide".encode("utf-16"),
        "x.pdf": b"text",
        "x.csv": b"text",
        "x.txt.gz": b"text",
        "no.jsonl": b'{"text": "one"}\n{"text": \n',
        "other.jsonl": b'{"text": "one"}\n{"texts": "two"}\n',
        "number.jsonl": b'{"text": 5}\n',
        "list.jsonl": b'["text"]\n',
        "deep.jsonl": b"[" * 100_000 + b"\n",
    }.items():
        (folder / name).write_bytes(content)
    states(folder)
    argv = [*TINY, "--data", str(folder / "snakes.txt"), "--run", str(folder / "done")]
    train.main([*argv, "--max-steps", "1"])
    return folder


def states(folder):
    """Files for --load-state: good, of another model, with a wrong or missing part, and cut off."""
    other = Context(model(seed=5), 300)
    other.feed([1])
    other.save(folder / "other.state")
    context = Context(checkpoint.load(folder / "model"), 300)
    context.feed([1])
    context.save(folder / "good.state")
    tensors = load_file(folder / "good.state")
    about = {"model": context._fingerprint()}
    save_file(tensors | {"1.ssm": torch.zeros(3)}, folder / "shape.state", about)
    del tensors["logits"]
    save_file(tensors, folder / "part.state", about)
    (folder / "cut.state").write_bytes((folder / "good.state").read_bytes()[:1000])


NEW = [*TINY, "--data", "snakes.txt"]  # the last value given counts
AGAIN = ["--run", "done", "--resume"]
MODEL = ["model", "--prompt", "x"]

# message: the command and its options
LIST = {
    "missing: no such file or folder": (train, *TINY, "--data", "missing"),
    "empty: no .txt, .md, .jsonl file in this folder": (train, *TINY, "--data", "empty"),
    "binary.txt: a binary file (leave it out), or text that needs": (
        train,
        *TINY,
        "--data",
        "binary.txt",
    ),
    "latin.txt: not text in UTF-8 (byte 2)": (train, *TINY, "--data", "latin.txt"),
    "x.pdf: expected a folder or a .txt, .md, .jsonl file": (train, *TINY, "--data", "x.pdf"),
    "wide.txt: not text in UTF-8 (byte 0); if it is utf-16: --encoding utf-16 reads": (
        *(train, *TINY, "--data", "wide.txt"),
    ),
    "latin.txt: not text in ASCII (byte 2)": (
        *(train, *TINY, "--data", "latin.txt", "--encoding", "ascii"),
    ),
    "--encoding: expected one like utf-8, utf-16 or cp1252, got 'utf-9'": (
        *(train, *NEW, "--encoding", "utf-9"),
    ),
    "--encoding: expected one like utf-8, utf-16 or cp1252, got 'base64'": (
        *(evaluate, "model", "--data", "snakes.txt", "--encoding", "base64"),
    ),
    "--text-field: expected the name of a field": (train, *NEW, "--text-field", ""),
    "--data: expected files or folders": (train, *TINY, "--data"),
    "x.csv: expected a folder or a .txt, .md, .jsonl file; pandas makes a .jsonl": (
        *(train, *TINY, "--data", "x.csv"),
    ),
    "x.txt.gz: expected a folder or a .txt, .md, .jsonl file; unpack": (
        *(evaluate, "model", "--data", "x.txt.gz"),
    ),
    "no.jsonl, line 2: not JSON": (train, *TINY, "--data", "no.jsonl"),
    "other.jsonl, line 2: no field `text`, only": (train, *TINY, "--data", "other.jsonl"),
    "number.jsonl, line 1: expected `text` to be a string": (train, "--data", "number.jsonl"),
    "list.jsonl, line 1: expected an object": (train, *TINY, "--data", "list.jsonl"),
    "deep.jsonl, line 1: nested too deeply": (train, *TINY, "--data", "deep.jsonl"),
    "--data: no text in these files   ": (train, *TINY, "--data", "nothing.txt"),
    "--data: no text in these files ": (
        *(train, *TINY, "--data", "nothing.txt", "--vocab-size", "300"),
    ),
    "--data: no text in these files  ": (train, "--data", "nothing.txt", "--from", "model"),
    "--seq-len: all documents together have": (train, *NEW, "--seq-len", "99999"),
    "--seq-len: expected at least 1, got 0": (train, *NEW, "--seq-len", "0"),
    "Error parsing --seq-len:": (train, *NEW, "--seq-len", "many"),
    "--batch-size: expected at least 1, got -3": (train, *NEW, "--batch-size", "-3"),
    "--accumulate: expected at least 1, got 0": (train, *NEW, "--accumulate", "0"),
    "--batch-size: expected below 9223372036854775808": (train, *NEW, "--batch-size", "9" * 30),
    "--preset: expected one of quick, ys-24m, ys-60m, ys-71m, got huge": (
        *(train, *NEW, "--preset", "huge"),
    ),
    "invalid choice 'letters'": (train, *NEW, "--tokenizer", "letters"),
    "invalid choice 'zero'": (train, *NEW, "--init", "zero"),
    "--vocab-size: these documents are enough for": (train, *NEW, "--vocab-size", "9000"),
    "snakes.txt: the files to train on stand after --data": (train, "snakes.txt"),
    "model: a run or a checkpoint, no text to read; `ysnake evaluate` takes it before": (
        *(evaluate, "--data", "snakes.txt", "model"),
    ),
    "model: a run or a checkpoint, no text to read; `ysnake evaluate` takes it before ": (
        *(train, *NEW, "model"),
    ),
    "done: a run or a checkpoint, no text to read; `ysnake evaluate` takes it before": (
        *(train, "--data", "snakes.txt", "done", "--size", "3M", "--plan"),
    ),
    "runs: no run there yet; `ysnake train` makes one  ": (run, "--stop", "x" * 5000, "y"),
    "--stop: model is a run or a checkpoint, no value of --stop; name it before": (
        run,
        "--stop",
        "x",
        "model",
    ),
    "--allow-host: model is a run or a checkpoint, no value of --allow-host; name it before": (
        serve,
        "--allow-host",
        "x",
        "model",
    ),
    "--port: expected at most 65535, got 99999": (watch, "--port", "99999"),
    "a bpe tokenizer needs at least 257, got 20": (train, *NEW, "--vocab-size", "20"),
    "a bpe tokenizer needs at least 257, got 256": (train, *NEW, "--plan", "--vocab-size", "256"),
    "--memory: expected a size like 8GB, got '8'": (train, *NEW, "--memory", "8"),
    "--chunk-size: expected at least 1, got -1": (train, *AGAIN, "--chunk-size", "-1"),
    "--vocab-size: cannot change in a resumed run, which has the default; got 300": (
        *(train, *AGAIN, "--vocab-size", "300"),
    ),
    "so a word tokenizer needs at least": (
        *(train, *NEW, "--vocab-size", "9", "--tokenizer", "word"),
    ),
    "--max-documents: expected at least 1, got 0": (train, *NEW, "--max-documents", "0"),
    "there: already exists; name another folder": (train, *NEW, "--run", "there"),
    "snakes.txt/run: Not a directory": (train, *NEW, "--run", "snakes.txt/run"),
    f"{'long' * 100}: File name too long": (train, *NEW, "--run", "long" * 100),
    "nowhere: no such checkpoint folder": (train, *NEW, "--from", "nowhere"),
    "empty/config.json: no such file": (train, *NEW, "--from", "empty"),
    "--d-model: the checkpoint model has 32, got 48": (
        *(train, "--data", "snakes.txt", "--from", "model", "--d-model", "48"),
    ),
    "--vocab-size: cannot be set with --from": (
        *(train, "--data", "snakes.txt", "--from", "model", "--vocab-size", "300"),
    ),
    "--tokenizer: cannot be set with --from": (
        *(train, "--data", "snakes.txt", "--from", "model", "--tokenizer", "bpe"),
    ),
    "--zero-out: cannot be set with --from": (
        *(train, "--data", "snakes.txt", "--from", "model", "--preset", "ys-24m", "--zero-out"),
    ),
    "--init: cannot be set with --from": (
        *(train, "--data", "snakes.txt", "--from", "model", "--init", "uniform"),
    ),
    "--output-size: cannot be set with --from": (
        *(train, "--data", "snakes.txt", "--from", "model", "--output-size", "8"),
    ),
    "--head-dim: expected a divisor of --expand * --d-model = 64, got 7": (
        train,
        *NEW,
        "--head-dim",
        "7",
    ),
    "--n-groups: expected a divisor of the 8 heads, got 3": (train, *NEW, "--n-groups", "3"),
    "--d-model: expected at least 1, got 0": (train, *NEW, "--d-model", "0"),
    "--chunk-size: expected at least 1, got 0": (train, *NEW, "--chunk-size", "0"),
    "these sizes ask for a model of more than a petabyte": (train, *NEW, "--d-model", "8" * 12),
    "--n-layers: expected at most 10000, got 999999999": (train, *NEW, "--n-layers", "9" * 9),
    "--lr: expected at least 0, got nan": (train, *NEW, "--lr", "nan"),
    "--lr: expected below": (train, *NEW, "--lr", "inf"),
    "--weight-decay: expected at least 0, got -1.0": (train, *NEW, "--weight-decay", "-1"),
    "--warmup-steps: expected at least 0, got -1": (train, *NEW, "--warmup-steps", "-1"),
    "--max-steps: expected at least 1, got 0": (train, *NEW, "--max-steps", "0"),
    "--max-minutes: expected above 0, got 0": (train, *NEW, "--max-minutes", "0"),
    "--max-minutes: expected at least 0, got nan": (train, *NEW, "--max-minutes", "nan"),
    "--stop-at-loss: expected at least 0, got nan": (train, *NEW, "--stop-at-loss", "nan"),
    "--patience: expected at least 1, got 0": (train, *NEW, "--patience", "0"),
    "--eval-every: expected at least 1, got 0": (train, *NEW, "--eval-every", "0"),
    "--checkpoint-every: expected at least 1, got 0": (train, *NEW, "--checkpoint-every", "0"),
    "--seed: expected at least 0, got -1": (train, *NEW, "--seed", "-1"),
    "--seed: expected below": (train, *NEW, "--seed", "9" * 30),
    "--threads: expected at least 1, got 0": (train, *NEW, "--threads", "0"),
    "--threads: expected 1 to 4096, got 5000": (train, *NEW, "--threads", "5000"),
    "--device: cuda:99 is not available here": (train, *NEW, "--device", "cuda:99"),
    "--device: meta is not available here": (train, *NEW, "--device", "meta"),
    "--device: expected auto, cpu, cuda or mps, got quick": (train, *NEW, "--device", "quick"),
    "invalid choice 'float8'": (train, *NEW, "--precision", "float8"),
    "nowhere/settings.json: no such file, so nowhere is not a run": (
        *(train, "--run", "nowhere", "--resume"),
    ),
    "--from: starts a new run, so it does not go with --resume": (train, *AGAIN, "--from", "model"),
    "--seq-len: cannot change in a resumed run, which has 24": (train, *AGAIN, "--seq-len", "9"),
    "Unrecognized options: --sequence": (train, *NEW, "--sequence", "9"),
    "--max-minutes: the run has trained 1 step and": (train, *AGAIN, "--max-minutes", "1e-9"),
    # run
    "runs: no run there yet; `ysnake train` makes one": (run, "--prompt", "x"),
    "nowhere: no such checkpoint folder ": (run, "nowhere", "--prompt", "x"),
    "done/third: no such checkpoint folder": (run, "done/third", "--prompt", "x"),
    "snakes.txt: no such checkpoint folder": (run, "snakes.txt", "--prompt", "x"),
    "config.json: no such file, so empty is neither": (run, "empty", "--prompt", "x"),
    "invalid choice 'first'": (run, *MODEL, "--checkpoint", "first"),
    "--max-tokens: expected at least 1, got 0": (run, *MODEL, "--max-tokens", "0"),
    "--temperature: expected at least 0, got nan": (run, *MODEL, "--temperature", "nan"),
    "--top-p: expected above 0 and at most 1, got 0.0": (run, *MODEL, "--top-p", "0"),
    "--top-k: expected at least 0, got -1": (run, *MODEL, "--top-k", "-1"),
    "--repetition-penalty: expected above 0, got 0.0": (run, *MODEL, "--repetition-penalty", "0"),
    "--seed: expected at most 63 bits": (run, *MODEL, "--seed", "9" * 30),
    "--stop: expected texts of at least one character": (run, *MODEL, "--stop", ""),
    "nothing: no such file": (run, *MODEL, "--load-state", "nothing"),
    "empty: not a saved state": (run, *MODEL, "--load-state", "empty"),
    "snakes.txt: not a saved state": (run, *MODEL, "--load-state", "snakes.txt"),
    "cut.state: not a saved state": (run, *MODEL, "--load-state", "cut.state"),
    "other.state: the state of another model": (run, *MODEL, "--load-state", "other.state"),
    "shape.state: not a saved state (1.ssm is": (run, *MODEL, "--load-state", "shape.state"),
    "part.state: not a saved state (logits is": (run, *MODEL, "--load-state", "part.state"),
    "--save-state: nowhere: no such folder; make it first": (
        run,
        *MODEL,
        "--save-state",
        "nowhere/x",
    ),
    "--threads: expected 1 to 4096, got 0": (run, *MODEL, "--threads", "0"),
    "--device: cpu:3 is not available here": (run, *MODEL, "--device", "cpu:3"),
    # evaluate
    "--data: expected files or folders to evaluate on": (evaluate, "model"),
    "missing: no such file or folder ": (evaluate, "model", "--data", "missing"),
    "--data: no text in these files": (evaluate, "model", "--data", "nothing.txt"),
    "--max-documents: expected at least 1, got -2": (
        *(evaluate, "model", "--data", "snakes.txt", "--max-documents", "-2"),
    ),
    "--threads: expected 1 to 4096, got -1": (
        *(evaluate, "model", "--data", "snakes.txt", "--threads", "-1"),
    ),
    "nowhere: no such checkpoint folder  ": (evaluate, "nowhere", "--data", "snakes.txt"),
    # export
    "Required options": (export, "model"),
    "--gguf: expected a file to write, got .": (export, "model", "--gguf", ""),
    "empty: expected a file to write, found a folder": (export, "model", "--gguf", "empty"),
    "--gguf: nowhere: no such folder; make it first": (export, "model", "--gguf", "nowhere/x.gguf"),
    "llama.cpp does not support the tokenizer of this model": (export, "words", "--gguf", "x.gguf"),
    "invalid choice 'q2'": (export, "model", "--gguf", "x.gguf", "--type", "q2"),
    # serve
    "--port: expected at most 65535, got 70000": (serve, "model", "--port", "70000"),
    "--port: expected at least 0, got -1": (serve, "model", "--port", "-1"),
    "--host, --port: 999.9.9.9:0": (serve, "model", "--host", "999.9.9.9", "--port", "0"),
    "--parallel: expected at least 1, got 0": (serve, "model", "--parallel", "0"),
    "--max-prompt: expected at least 1, got 0": (serve, "model", "--max-prompt", "0"),
    "--waiting: expected at least 0, got -1": (serve, "model", "--waiting", "-1"),
    "nowhere: no such checkpoint folder   ": (serve, "nowhere", "--port", "0"),
    "--threads: expected 1 to 4096, got -3": (serve, "model", "--threads", "-3", "--port", "0"),
    # generate_data
    "--count: expected at least 1, got 0": (generate_data, "--count", "0"),
    "--parallel: expected at least 1, got 0 ": (generate_data, "--parallel", "0"),
    "--max-tokens: expected at least 1, got 0 ": (generate_data, "--max-tokens", "0"),
    "--min-words: expected at least 1, got 0": (generate_data, "--min-words", "0"),
    "--retries: expected at least 0, got -1": (generate_data, "--retries", "-1"),
    "--temperature: expected at least 0, got nan ": (generate_data, "--temperature", "nan"),
    "invalid choice 'lies'": (generate_data, "--kinds", "lies"),
    "no Ollama server answers at 127.0.0.1:9": (generate_data, "--out", "new"),
    "OLLAMA_HOST: expected HOST:PORT, got 'here:there'": (generate_data, "--out", "new "),
}
NOT_WRONG = ("no Ollama server",)  # what fails instead


def check(code, errors, message):
    message = message.rstrip()
    assert "Traceback" not in errors
    if errors.startswith("error: "):
        assert message in errors
        assert errors.count("\n") == 1
        assert len(errors) < 1000
    else:  # tyro prints errors of reading options in a box
        assert message in " ".join(errors.replace("│", " ").split())
    assert code == (1 if any(text in message for text in NOT_WRONG) else 2)


@pytest.mark.parametrize("message", LIST)
def test_a_line_names_it_and_nothing_is_written(folder, monkeypatch, message):
    """Through the entry point itself, so that its exit code counts, and a traceback would."""
    command, *options = LIST[message]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLLAMA_HOST", "here:there" if "OLLAMA" in message else "127.0.0.1:9")
    before = sorted(folder.rglob("*"))
    code, _, errors = entry(command.main, *options)
    check(code, errors, message)
    assert sorted(folder.rglob("*")) == before


def test_what_does_not_fit_in_memory(folder, tmp_path):
    command = [*TINY, "--data", folder / "snakes.txt", "--run", tmp_path / "run"]
    code, _, errors = entry(train.main, *command, "--batch-size", str(10**12))
    assert (code, errors.count("\n")) == (2, 1)
    assert "--batch-size, --seq-len: expected at most 67,108,864 tokens in a step" in errors
    code, _, errors = entry(train.main, *command, "--d-model", "65536", "--n-layers", "999")
    assert (code, errors.count("\n")) == (2, 1)
    assert "a smaller model takes less" in errors


def test_memory_that_torch_cannot_have():
    def command(argv):
        torch.empty(1 << 50)

    code, _, errors = entry(command)
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: not enough memory")


def test_a_model_without_tokens_that_frame_a_document(folder, tmp_path):
    other = shutil.copytree(folder / "model", tmp_path / "model")
    (other / "manifest.json").unlink()
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"bos_token_id": None}))
    data = ("--data", folder / "snakes.txt")
    for command, options, message in (
        (evaluate, (other, *data), "bos_id: expected a token of the model, got None"),
        (
            train,
            ("--from", other, *data, "--run", tmp_path / "run", "--seq-len", "8"),
            "bos_id: expected a token of the model, got None",
        ),
        (run, (other, "--prompt", ""), "--prompt: expected text, as this model has no token"),
    ):
        code, _, errors = entry(command.main, *options)
        check(code, errors, message)
    assert entry(run.main, other, "--prompt", "The", "--max-tokens", "1")[0] == 0


def test_the_list_is_long():
    assert len(LIST) >= 60


@pytest.mark.parametrize("command", [train, evaluate, export, generate_data])
def test_in_a_process_of_its_own(folder, command):
    """The first of each command's list once more, as a user would see it."""
    message, options = next(
        (text, options) for text, (of, *options) in LIST.items() if of is command and ":" in text
    )
    done = python(command.__name__, *options, cwd=folder)
    check(done.returncode, done.stderr, message)


CONFIGS = {
    "expected an object, got list": [],
    "expected model_type mamba2, got mamba": {"model_type": "mamba"},
    "hidden_size, num_hidden_layers, state_size, head_dim missing": {"hidden_size": ...},
    'd_model: expected a whole number, got "64"': {"hidden_size": "64"},
    "d_model: expected a whole number, got true": {"hidden_size": True},
    "d_model: expected a whole number, got 64.0": {"hidden_size": 64.0},
    "n_layers: expected a whole number, got null": {"num_hidden_layers": None},
    "n_layers: expected at least 1, got -1": {"num_hidden_layers": -1},
    "vocab_size: expected a whole number, got [1, 2]": {"vocab_size": [1, 2]},
    "tied: expected true or false, got 1": {"tie_word_embeddings": 1},
    'norm_eps: expected a number, got "small"': {"layer_norm_epsilon": "small"},
    "conv_width: expected at least 2, got 1": {"conv_kernel": 1},
    "bos_id: expected below vocab_size, got 9999": {"bos_token_id": 9999},
    'eos_id: expected a whole number or null, got {"a": 1}': {"eos_token_id": {"a": 1}},
    "a value of a wrong kind": {"time_step_limit": [1]},
    "dt_limit: expected 0 <= low <= high, got (2.0, 1.0)": {"time_step_limit": [2, 1]},
    "dt_min, dt_max: expected a range, got 0, 0.1": {"time_step_min": 0},
    "norm_eps: expected at least 0, got -1": {"layer_norm_epsilon": -1},
    "hidden_act relu is not supported": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_a_config_that_cannot_be(folder, tmp_path, message):
    folder = shutil.copytree(folder / "model", tmp_path / "model")
    (folder / "manifest.json").unlink()
    path, changes = folder / "config.json", CONFIGS[message]
    content = json.loads(path.read_text()) | dict(changes)
    if content["hidden_size"] is ...:
        content = {"model_type": "mamba2", "vocab_size": 320}
    path.write_text(json.dumps(content if changes != [] else []))
    code, _, errors = entry(run.main, folder, "--prompt", "x")
    check(code, errors, f"{path}: {message}")
