"""Completing text from the command line: prompts, pipes, states in files, stop texts, memory."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from small import entry, environment, model, python, saved
from tokenizers import Tokenizer, decoders, models, normalizers

from ysnake import evaluate, run
from ysnake.checkpoints import checkpoint
from ysnake.inference import generate
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context, choose
from ysnake.inference.sampling import Sampling
from ysnake.inference.text_stream import texts, until
from ysnake.language_model import LanguageModel
from ysnake.model.config import ModelConfig
from ysnake.model.network import Model
from ysnake.shared.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("run"))


def complete(folder, *options, **kwargs):
    done = python("ysnake.run", folder, *options, cwd=folder.parent, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(capsys, folder, *options):
    """The same as `complete`, in this process."""
    assert run.main([str(folder), *map(str, options)]) == 0
    return capsys.readouterr().out


def test_prompt_pipe_and_seed(folder, capsys):
    options = ("--max-tokens", "30", "--seed", "1", "--threads", "1")
    first = complete(folder, *options, input="The adder\n")  # as echo writes it
    assert first == here(capsys, folder, "--prompt", "The adder", *options)
    assert first != here(
        capsys, folder, "--prompt", "The adder", "--max-tokens", "30", "--seed", "2"
    )


def test_a_state_does_not_depend_on_the_number_of_threads(tmp_path):
    """A sum of floating-point numbers does: threads add them in another order."""
    big = Model(ModelConfig(vocab_size=13_184, d_model=512, n_layers=1, d_state=16))
    context, threads = Context(big, 13_184), torch.get_num_threads()
    context.feed([1, 2])
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            if number == 1:
                context.save(tmp_path / "state")
            Context(big, 13_184).load(tmp_path / "state")
    finally:
        torch.set_num_threads(threads)


def test_a_state_in_a_file_goes_on_where_the_prompt_ended(folder, tmp_path, capsys):
    greedy = ("--temperature", "0", "--max-tokens", "20")
    whole = here(capsys, folder, "--prompt", "The adder number 3", *greedy)
    state = tmp_path / "state"
    assert here(capsys, folder, "--prompt", "The adder", "--save-state", state) == ""
    rest = ("--load-state", state, "--prompt", " number 3", *greedy)
    assert here(capsys, folder, *rest) == whole
    other = tmp_path / "other"
    checkpoint.save(other, model(seed=5, vocab=300), checkpoint.load_tokenizer(folder))
    code, _, errors = entry(run.main, other, "--load-state", state, "--prompt", "x")
    assert code == 2
    assert errors.endswith("state: the state of another model\n")


def test_interactive_loop(tmp_path):
    """In a real terminal: two prompts, Ctrl-C inside a completion, an empty line, Ctrl-D."""
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    folder = saved(tmp_path, eos_id=None)  # no completion ends by itself
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ysnake.run", str(folder)),
            "--max-tokens=2000000",
            "--seed=1",
            "--threads=1",
        ],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=folder.parent,
        env=environment() | {"TERM": "dumb"},
        start_new_session=True,
        # what a shell starts in the background ignores Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(follower)
    seen = ""

    def wait_for(pattern):
        nonlocal seen
        end = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert select.select([leader], [], [], max(0, end - time.monotonic()))[0], seen[-500:]
            seen += os.read(leader, 4096).decode(errors="replace")
        seen = ""

    wait_for("> $")
    for line in ("The adder\n", "\n"):
        os.write(leader, line.encode())
        wait_for(r"\S{20}|\s\S+\s\S+")
        process.send_signal(signal.SIGINT)
        wait_for(r"\[stopped\]\s+> $")
    os.write(leader, b"\x04")
    assert process.wait(30) == 0
    os.close(leader)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell the peak memory")
@pytest.mark.parametrize("tokens", [1_500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_any_length(folder, tokens):
    """The peak after all generated tokens is within 20 MB of that after 500."""
    script = f"""
import resource
from ysnake.checkpoints import checkpoint
from ysnake.inference.decoding import Decoder
from ysnake.inference.generate import Context
from ysnake.inference.sampling import Sampling
context = Context(Decoder(checkpoint.load({str(folder)!r})), 300)
context.model.config = __import__("dataclasses").replace(context.model.config, eos_id=-1)
context.feed([1, 2, 3])
for n, _ in enumerate(context.generate(Sampling(seed=0), {tokens}), 1):
    if n in (500, {tokens}):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 20_000  # kilobytes


def test_sampling():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    seen = torch.tensor([False, False, False, True])
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        return {choose(logits, seen, Sampling(**settings), generator) for _ in range(200)}

    assert drawn(temperature=1.0, top_p=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=0) == {3}
    assert drawn(top_k=2, top_p=1.0) == {2, 3}
    assert drawn(temperature=1.0, top_p=0.8) == {2, 3}  # 0.64 + 0.24 is the first sum above
    assert drawn(top_p=1e-9) == {3}
    assert drawn(temperature=0, repetition_penalty=2.0) == {2}
    for lowest in (1e-6, 1e-38, 1e-300):
        assert drawn(temperature=lowest, top_p=1.0) == {3}


def test_padding_is_never_drawn(folder):
    m = model(vocab=300)
    context = Context(m, 300)
    context.feed([1])
    context.logits[300:] = 100.0
    assert all(t < 300 for t in context.generate(Sampling(), 3))


def test_a_prompt_in_pieces_equals_one_piece(monkeypatch):
    from ysnake.inference import generate

    ids = torch.randint(300, (50,)).tolist()
    whole, pieces = Context(model(), 300), Context(model(), 300)
    whole.feed(ids)
    monkeypatch.setattr(generate, "PROMPT_STEP", 7)
    pieces.feed(ids)
    torch.testing.assert_close(whole.logits, pieces.logits)
    assert torch.equal(whole.seen, pieces.seen)


def test_stop_texts_end_the_completion_across_pieces():
    pieces = ["The en", "d of", " the END", " and"]
    assert "".join(until(pieces, ("END",))) == "The end of the "
    assert "".join(until(pieces, ("d o", "END"))) == "The en"
    assert "".join(until(pieces, ())) == "The end of the END and"
    assert "".join(until(["a", "b", "a"], ("abc",))) == "aba"


def test_text_streams_in_whole_characters(folder):
    tokenizer = checkpoint.load_tokenizer(folder)
    text = "蛇 🐍 é"
    assert "".join(texts(tokenizer, tokenizer.encode(text).ids)) == text


SPACE = "\u2581"
BYTES = {f"<0x{i:02X}>": i for i in range(256)}


def test_broken_bytes_do_not_end_a_text():
    """Half a character behind a whole one makes the decoder show both as broken."""
    fallback = Tokenizer(models.BPE(vocab=BYTES | {"a": 256}, merges=[], byte_fallback=True))
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    euro, a = list("€".encode()), 256
    ids = [a, *euro, *euro[:1], a, a, *euro, a]
    assert "".join(texts(fallback, ids)) == "a€\ufffdaa€a"


def test_the_first_space_of_a_completion_is_kept(monkeypatch):
    """A tokenizer as Llama 2's decodes a space at the start of a text as nothing."""
    spaced = Tokenizer(models.BPE(vocab={SPACE: 0, "a": 1, SPACE + "b": 2}, merges=[]))
    spaced.normalizer = normalizers.Replace(" ", SPACE)
    spaced.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    monkeypatch.setattr(generate, "choose", lambda *_: 2)
    assert "".join(texts(spaced, [2, 2])) == "b b"
    assert "".join(texts(spaced, [2, 2], after=1)) == " b b"
    assert LanguageModel(Decoder(model(vocab=64)), spaced).generate("a", 2) == " b b"


def test_a_part_of_a_character_before_a_completion_is_not_shown_with_it(folder):
    tokenizer = checkpoint.load_tokenizer(folder)
    snake, a = tokenizer.encode("蛇").ids, tokenizer.encode("a").ids
    assert "".join(texts(tokenizer, a, after=snake[0])) == "a"


def test_wrong_ways_to_draw():
    for bad in ({"temperature": -1}, {"top_k": -1}, {"repetition_penalty": 0}):
        with pytest.raises(InputError, match="expected"):
            Sampling(**bad)


def test_evaluate_equals_the_loss_of_whole_documents(folder, tmp_path):
    from ysnake.inference import score as scoring
    from ysnake.text.tokenizer import encode

    m, tokenizer = checkpoint.load(folder).eval(), checkpoint.load_tokenizer(folder)
    documents = ["The viper counts to 12. " * 30, "蛇", "x y z"]
    pieces = [(documents[0][:100], False), (documents[0][100:], True)]
    pieces += [(d, True) for d in documents[1:]]
    read = scoring.READ
    scoring.READ = 16
    try:
        total = scoring.score(Decoder(m), tokenizer, pieces, lambda n: None)
    finally:
        scoring.READ = read
    nats = tokens = 0
    for parts in ([documents[0][:100], documents[0][100:]], *([d] for d in documents[1:])):
        ids = [0, *chain(*(encode(tokenizer, part) for part in parts)), 0]
        with torch.no_grad():
            logits = m(torch.tensor([ids[:-1]]))[0]
            nats += torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[1:]), reduction="sum"
            ).item()
        tokens += len(ids) - 1
    assert total.tokens == tokens
    assert total.documents == 3
    assert total.bytes == sum(len(d.encode()) for d in documents)
    assert total.nats == pytest.approx(nats, rel=1e-5)


def test_text_that_the_tokenizer_drops_counts_and_is_told():
    from ysnake.inference import score as scoring
    from ysnake.text import tokenizer as tokenizers

    words = tokenizers.train("word", ["The boa sleeps in the grass. " * 9], 300)
    decoder = Decoder(model(vocab=words.get_vocab_size()).eval())
    known, half, none = (
        scoring.score(decoder, words, [(text, True)], lambda n: None)
        for text in ("The boa sleeps. " * 20, "The boa 蛇蛇 sleeps. " * 20, "蛇" * 100)
    )
    assert (known.dropped, half.dropped, none.dropped) == (0, 6 * 20, 300)
    assert known.bits_per_byte < half.bits_per_byte < none.bits_per_byte
    assert none.bits_per_byte >= 8
    assert known.warning() is None
    assert "drops 100.0% of the text (300 of 300 bytes)" in none.warning()


def test_the_loss_of_16_bit_weights_is_summed_in_32_bits(folder):
    """As on a GPU, where `--weights bfloat16` makes the logits bfloat16 too."""
    from ysnake.inference import score as scoring
    from ysnake.text.tokenizer import encode

    tokenizer = checkpoint.load_tokenizer(folder)
    decoder = Decoder(checkpoint.load(folder).bfloat16())
    text = "The viper counts to 12 and wakes. " * 20
    ids = [*encode(tokenizer, text), 0]
    logits, _ = decoder.step(torch.tensor([[0, *ids[:-1]]]))
    assert logits.dtype == torch.bfloat16
    right = torch.nn.functional.cross_entropy(
        logits[0].double(), torch.tensor(ids), reduction="sum"
    )
    total = scoring.score(decoder, tokenizer, [(text, True)], lambda n: None)
    assert total.nats == pytest.approx(right.item(), rel=1e-5)


def test_evaluate_command(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "The boa number 5 sleeps."}) + "\n")
    code, printed, errors = entry(evaluate.main, folder, "--data", tmp_path / "a.jsonl")
    assert code == 0, errors
    assert re.search(r"\d\.\d{4} nats per token, \d\.\d{4} bits per byte", printed)
    code, _, errors = entry(evaluate.main, folder)
    assert (code, "--data: expected" in errors) == (2, True)


def test_evaluate_prints_the_name_of_the_checkpoint(tmp_path):
    place = tmp_path / "run[lr=3e-3]"
    place.mkdir()
    text = tmp_path / "a.txt"
    text.write_text("The boa sleeps.")
    code, printed, errors = entry(evaluate.main, saved(place), "--data", text)
    assert code == 0, errors
    assert f"{place / 'model'}: " in printed
