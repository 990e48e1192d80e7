"""A run that takes the tokens of another run trains as if it had read the text."""

import json

import pytest
from small import TINY, saved
from test_train import fit, same_training

from ysnake import train
from ysnake.checkpoints import checkpoint
from ysnake.shared.errors import InputError
from ysnake.training import settings

LENGTH = ["--max-steps", 2, "--eval-every", 10]


@pytest.fixture
def first(tmp_path):
    """A run whose text is gone."""
    run = fit(tmp_path, *LENGTH)
    (tmp_path / "snakes.txt").rename(tmp_path / "moved.txt")
    return run


def settings_of(run):
    return json.loads((run / "settings.json").read_text())


def test_the_text_is_not_read_again(first, tmp_path):
    again = tmp_path / "again"
    config = ["--config", str(first / "settings.json"), "--tokens-from", str(first)]
    assert train.main([*config, "--run", str(again)]) == 0
    assert same_training(first, again)
    ours, theirs = settings_of(again), settings_of(first)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"tokens_from"}
    argv = ["--run", str(again), "--resume", "--max-steps", "3", "--tokens-from", str(first)]
    assert train.main(argv) == 0


def test_an_option_may_be_written_with_underscores(first, tmp_path):
    argv = ["--tokens_from", str(first), "--run", str(tmp_path / "new"), "--max_steps", "1"]
    assert settings.parse(argv).tokens_from == first


def test_it_works_for_other_settings_of_the_model(first, tmp_path, capsys):
    other = tmp_path / "other"
    sizes = ["--d-model", "16", "--n-layers", "1", "--d-state", "4", "--head-dim", "4"]
    argv = ["--tokens-from", str(first), "--run", str(other), *sizes, *map(str, LENGTH)]
    assert train.main([*argv, "--seq-len", "16", "--plan"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert not other.exists()
    assert train.main([*argv, "--seq-len", "16"]) == 0
    assert f"tokens and tokenizer of {first}" in "".join(capsys.readouterr().out.split("\n"))
    name = "last/tokenizer.json"
    assert (other / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--vocab-size", "400"],
            "--vocab-size: expected 300, as in the run of --tokens-from, got 400",
        ),
        (
            ["--data", "other.txt"],
            r"--data: expected /.*snakes\.txt, as in the run of .*, got other\.txt",
        ),
        (["--from", "run0"], "--from, --tokens-from: give only one of them"),
    ],
)
def test_another_text_or_tokenizer_is_refused(first, options, message, monkeypatch):
    monkeypatch.chdir(first.parent)
    with pytest.raises(InputError, match=message):
        settings.parse(["--tokens-from", str(first), *options])


def test_tokens_that_are_gone_or_damaged_are_named(first, tmp_path):
    tokens = first / "data/train.tokens"
    content = bytearray(tokens.read_bytes())
    content[0] ^= 1
    tokens.write_bytes(content)
    argv = ["--tokens-from", str(first), "--run", str(tmp_path / "new"), "--max-steps", "1"]
    with pytest.raises(InputError, match=r"train\.tokens: damaged or exchanged"):
        train.main(argv)
    tokens.unlink()
    with pytest.raises(InputError, match=r"--tokens-from: .*train\.tokens: no such file"):
        train.main(argv)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["<|endoftext|>", "<s>"])
def test_the_tokens_around_documents_come_with_the_tokens(tmp_path, name):
    """Those of a checkpoint of others are not those of ysnake, which its tokenizer may lack."""
    folder = saved(tmp_path, eos_id=2)  # bos 0 and eos 2, as Hugging Face's Mamba2 has them
    (folder / "manifest.json").unlink()
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", name))
    argv = ["--from", str(folder), "--data", str(tmp_path / "snakes.txt"), "--seq-len", "24"]
    short = ["--max-steps", "1", "--run"]
    assert train.main([*argv, *short, str(tmp_path / "first")]) == 0
    argv = [*TINY, "--tokens-from", str(tmp_path / "first")]
    assert train.main([*argv, *short, str(tmp_path / "second")]) == 0
    config = checkpoint.load_config(tmp_path / "second/last")
    assert config.document_tokens() == (0, 2)
    assert checkpoint.load_tokenizer(tmp_path / "second/last").token_to_id(name) == 0
