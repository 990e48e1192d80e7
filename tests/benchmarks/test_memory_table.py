"""The rows of the memory table can be trained, on text with enough words."""

from rich.console import Console

from benchmarks.memory import ROWS, corpus
from ysnake.text import data
from ysnake.training.new_run import train_tokenizer
from ysnake.training.options import Settings


def test_the_text_gives_the_largest_vocabulary(tmp_path):
    wanted = max(row.vocab_size for row in ROWS)
    path = corpus(tmp_path, wanted)
    settings = Settings(data=(path,), tokenizer="word", vocab_size=wanted)
    tokenizer = train_tokenizer(settings, data.open_corpus(settings), Console(quiet=True))
    assert tokenizer.get_vocab_size() == wanted


def test_rows_have_names_of_their_own():
    sizes = ("seq_len", "batch_size", "chunk_size")
    named = {(row.name, *(getattr(row, size) for size in sizes)) for row in ROWS}
    assert len(named) == len(ROWS)
