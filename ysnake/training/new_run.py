"""Starting a training run: its folder, tokenizer, tokens on disk and first weights."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake.model.config import ModelConfig, model_config
from ysnake.shared import cli, manifest
from ysnake.shared.errors import InputError
from ysnake.shared.progress import announce, counted, progress
from ysnake.shared.shown import amount, escape_controls
from ysnake.training import evaluation, expectation, launch, memory, precision, run_folder, size
from ysnake.training import settings as settings_of
from ysnake.training.options import SHIPPED, Settings
from ysnake.training.parallel import Ranks
from ysnake.training.resume import own_config
from ysnake.training.run import Progress, Run, assemble, save_last
from ysnake.training.signals import stop_at_once

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

    from ysnake.model.network import Model
    from ysnake.text.data import Corpus, Counts

NO_TEXT = "no text in these files"


def start(settings: Settings, console: "Console") -> Run:
    """Make the folder of a new run: tokenizer, tokens on disk, first weights. All or nothing."""
    from ysnake.checkpoints import checkpoint
    from ysnake.text import chat_template, data

    run_folder.check_free(settings.run)
    corpus = _open_corpus(settings)
    device = cli.pick_device(settings.device)
    # Several processes read the run from its folder. Then no GPU needs to hold all of it.
    place = device if launch.processes() == 1 else "cpu"
    settings.precision, about_precision = precision.choose_precision(settings.precision, device)
    kept: dict[str, str] = {}
    if settings.from_ is not None:
        kept = chat_template.kept(checkpoint.resolve(settings.from_))

    def fill(folder: Path) -> "tuple[Tokenizer, Model, list[str]]":
        tokenizer, model, speed = _tokenizer_and_model(settings, corpus, device, console)
        tokens = folder / "data"
        tokens.mkdir()
        if corpus is None:
            assert settings.tokens_from is not None
            said = _copy_tokens(settings.tokens_from / "data", tokens)
        else:
            counts = _tokenise(corpus, tokenizer, model.config, tokens, console)
            said = [*counts.lines(), *corpus.left_out.lines()]
            if counts.val_dropped:
                share = counts.val_dropped / counts.val_bytes
                (tokens / evaluation.DROPPED_SHARE).write_text(f"{share}\n")
        vocabulary = (tokenizer.get_vocab_size(), *model.config.document_tokens())
        if corpus is not None and not counts.bytes:
            raise InputError(NO_TEXT, field="--data")
        n_tokens = len(data.Tokens.open(tokens / "train.tokens", *vocabulary))
        if n_tokens <= settings.seq_len:
            raise InputError(
                f"all documents together have {amount(n_tokens, 'token')} to train on, "
                f"fewer than a window of {settings.seq_len} and the token after it; more text or "
                "a smaller number helps",
                field="--seq-len",
            )
        if speed is not None:
            said += expectation.lines(settings, model.config, n_tokens, speed)
        manifest.write(tokens)
        here = replace(settings, run=folder)
        run = assemble(here, model, tokenizer, Progress(), Ranks(), place)
        run.tokenizer_settings = kept
        save_last(run)
        launch.record_launch(folder)
        settings_of.write(here)
        checkpoint.sync(folder)
        return tokenizer, model, said

    default = cli.RUNS / f"{settings.preset or settings.size}-{time.strftime('%Y%m%d-%H%M%S')}"
    with stop_at_once():
        folder, (tokenizer, model, said) = run_folder.make(settings.run, default, fill)
    settings.run = folder
    console.print(f"[bold]{cli.markup(folder)}[/]: {model.n_parameters():,} parameters on {device}")
    for line in [*said, *about_precision]:
        console.print(escape_controls(line), markup=False)
    run = assemble(settings, model, tokenizer, Progress(), Ranks(), place)
    run.tokenizer_settings = kept
    return run


def _tokenizer_and_model(
    settings: Settings, corpus: "Corpus | None", device: str, console: "Console"
) -> "tuple[Tokenizer, Model, float | None]":
    """The tokenizer of a new run, its model with its first weights, and with --size its speed."""
    import torch

    from ysnake.checkpoints import checkpoint
    from ysnake.model.network import Model

    if settings.from_ is not None:
        _, tokenizer, model = checkpoint.load_all(settings.from_)
        model.float()  # of a checkpoint in float64
        model.config.document_tokens()  # raises before the text is tokenised
        if settings.chunk_size is not None:
            model.use_config(replace(model.config, chunk_size=settings.chunk_size))
        memory.choose_batch_size(settings, model.config)
        memory.check(settings, model.config, device)
        return tokenizer, model, None
    tokenizer = _make_tokenizer(settings, corpus, console)
    config = _config(settings, tokenizer)
    memory.choose_batch_size(settings, config)
    memory.check(settings, config, device)
    speed = _speed(settings, config)
    with torch.random.fork_rng(devices=[]):  # a program's own random numbers stay as they are
        torch.default_generator.manual_seed(settings.seed)
        return tokenizer, Model(config, settings.init, settings.zero_out), speed


def _speed(settings: Settings, config: ModelConfig) -> float | None:
    """With --size: the tokens per second of training here.

    None with several processes, or if a step does not fit into the memory.
    """
    if settings.size is None or launch.launched():
        return None
    from ysnake.training.speed import measure_if_it_fits

    return measure_if_it_fits(settings, config)


def plan(settings: Settings, console: "Console") -> Any:
    """The table of --plan. Documents are read only if they determine the vocabulary.

    With --size the console first gets what to expect.
    """
    from ysnake.checkpoints import checkpoint

    if settings.resume or settings.from_ is not None:
        source = settings.from_
        if source is None or settings.resume:
            source = settings.folder / "last"
        config = checkpoint.load_config(checkpoint.resolve(source))
        config = own_config(config, settings)
    elif settings.vocab_size is not None:
        config = model_config(settings, settings.vocab_size, 0)
    else:
        tokenizer = _make_tokenizer(settings, _open_corpus(settings), console)
        config = _config(settings, tokenizer)
    if not settings.resume and (speed := _speed(settings, config)):
        n_tokens = size.text_bytes(settings) / size.BYTES_PER_TOKEN
        for line in expectation.lines(settings, config, n_tokens, speed):
            console.print(line, markup=False)
    return memory.table(config, settings)


def _open_corpus(settings: Settings) -> "Corpus | None":
    """The documents to train on; None if another run has their tokens."""
    from ysnake.text import data

    if settings.tokens_from is not None:
        return None
    if settings.data == (SHIPPED,) and not SHIPPED.is_dir():
        raise InputError(
            "the shipped corpus is not installed here; give files or folders", field="--data"
        )
    return data.open_corpus(settings)


def _make_tokenizer(settings: Settings, corpus: "Corpus | None", console: "Console") -> "Tokenizer":
    """The tokenizer of --tokens-from, or a new one."""
    if corpus is not None:
        return train_tokenizer(settings, corpus, console)
    from ysnake.checkpoints import checkpoint

    assert settings.tokens_from is not None
    return checkpoint.load_tokenizer(checkpoint.resolve(settings.tokens_from, "last"))


def _copy_tokens(source: Path, folder: Path) -> list[str]:
    """Put the tokens of another run into this folder. Returns what to tell the user.

    The files are linked where the file system can do it, since nothing changes them.
    """
    names = ["train.tokens", "val.tokens"]
    for name in names:
        if not (source / name).is_file():
            raise InputError(f"{source / name}: no such file", field="--tokens-from")
        manifest.verify(source / name)
    if (source / evaluation.DROPPED_SHARE).is_file():
        names.append(evaluation.DROPPED_SHARE)
    for name in names:
        try:
            os.link(source / name, folder / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / name, folder / name)
    return [f"tokens and tokenizer of {source.parent}"]


def _config(settings: Settings, tokenizer: "Tokenizer") -> ModelConfig:
    """The model of a new run. Its document tokens are those in the tokens to train on."""
    from ysnake.checkpoints import checkpoint
    from ysnake.text.tokenizer import eot_id

    if settings.tokens_from is None:
        bos = eos = eot_id(tokenizer)
    else:  # another program's, if that run began with its checkpoint
        last = checkpoint.resolve(settings.tokens_from, "last")
        bos, eos = checkpoint.load_config(last).document_tokens()
    return replace(model_config(settings, tokenizer.get_vocab_size(), eos), bos_id=bos)


def train_tokenizer(settings: Settings, corpus: "Corpus", console: "Console") -> "Tokenizer":
    """Train the tokenizer on the training documents, with the requested size."""
    from ysnake.text import data
    from ysnake.text import tokenizer as tokenizers

    wanted = size.vocabulary(settings, corpus.size)
    found = False
    with progress(console) as show:

        def texts() -> Iterator[str]:
            nonlocal found
            advance = counted(show, corpus.size, "reading for the vocabulary")
            for part in data.split(corpus.pieces()):
                found = True
                if not part.held_out:
                    yield part.text
                advance(len(part.text))
            announce(console, show, "choosing the entries of the vocabulary")

        tokenizer = tokenizers.train(settings.tokenizer or "bpe", texts(), wanted)
    if not found:
        raise InputError(NO_TEXT, field="--data")
    found_size = tokenizer.get_vocab_size()
    if found_size < wanted and settings.vocab_size is not None:
        raise InputError(
            f"these documents are enough for {found_size} entries only, got {wanted}",
            field="--vocab-size",
        )
    if found_size < wanted:
        console.print(f"vocabulary: {found_size:,} entries; more text is needed for a larger one")
    return tokenizer


def _tokenise(
    corpus: "Corpus",
    tokenizer: "Tokenizer",
    config: ModelConfig,
    folder: Path,
    console: "Console",
) -> "Counts":
    from ysnake.text import data

    with progress(console) as show:
        advance = counted(show, corpus.size, "writing tokens")
        document_tokens = config.document_tokens()
        return data.write_tokens(corpus.pieces(), tokenizer, *document_tokens, folder, advance)
