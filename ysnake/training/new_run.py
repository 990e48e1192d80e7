"""Starting a training run: its folder, tokenizer, tokens on disk and first weights."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake.model.config import PRESETS, ModelConfig, model_config
from ysnake.shared import cli, manifest
from ysnake.shared.errors import InputError
from ysnake.shared.progress import counted, progress
from ysnake.shared.shown import amount, escape_controls
from ysnake.training import launch, memory, run_folder
from ysnake.training import settings as settings_of
from ysnake.training.parallel import Ranks
from ysnake.training.run import Progress, Run, assemble, save_last
from ysnake.training.settings import SHIPPED, Settings
from ysnake.training.signals import stop_at_once

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

    from ysnake.text.data import Corpus, Counts


def start(settings: Settings, console: "Console") -> Run:
    """Make the folder of a new run: tokenizer, tokens on disk, first weights. All or nothing."""
    import torch

    from ysnake.checkpoints import checkpoint
    from ysnake.model.network import Model
    from ysnake.text import data

    run_folder.check_free(settings.run)
    if settings.data == (SHIPPED,) and not SHIPPED.is_dir():
        raise InputError(
            "the shipped corpus is not installed here; give files or folders", field="--data"
        )
    corpus = data.open_corpus(settings)
    device = cli.pick_device(settings.device)

    if settings.from_ is not None:
        _, tokenizer, model = checkpoint.load_all(settings.from_)
        model.config.check_frame()
        if settings.chunk_size is not None:
            model.use_config(replace(model.config, chunk_size=settings.chunk_size))
        memory.fit(settings, model.config)
        memory.check(settings, model.config, device)
    else:
        tokenizer = train_tokenizer(settings, corpus, console)
        config = _config(settings, tokenizer)
        memory.fit(settings, config)
        memory.check(settings, config, device)
        torch.manual_seed(settings.seed)
        model = Model(config, settings.init)

    def fill(folder: Path) -> Any:
        tokens = folder / "data"
        tokens.mkdir()
        counts = _tokenise(corpus, tokenizer, model.config, tokens, console)
        if counts.train_tokens <= settings.seq_len:
            raise InputError(
                f"all documents together have {amount(counts.train_tokens, 'token')} to train on, "
                f"fewer than a window of {settings.seq_len} and the token after it",
                field="--seq-len",
            )
        manifest.write(tokens)
        here = replace(settings, run=folder)
        save_last(assemble(here, model, tokenizer, Progress(), Ranks()))
        launch.record_launch(folder)
        settings_of.write(here)
        checkpoint.sync(folder)
        return counts

    default = cli.RUNS / f"{settings.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    with stop_at_once():
        folder, counts = run_folder.make(settings.run, default, fill)
    settings.run = folder
    console.print(f"[bold]{cli.markup(folder)}[/]: {model.n_parameters():,} parameters on {device}")
    for line in [*counts.lines(), *corpus.left_out.lines()]:
        console.print(escape_controls(line), markup=False)
    return assemble(settings, model, tokenizer, Progress(), Ranks())


def plan(settings: Settings, console: "Console") -> Any:
    """The table of --plan. Documents are read only if they determine the vocabulary."""
    from ysnake.checkpoints import checkpoint
    from ysnake.text import data

    if settings.resume or settings.from_ is not None:
        source = settings.from_
        if source is None or settings.resume:
            source = settings.folder / "last"
        config = checkpoint.load_config(checkpoint.resolve(source))
        config = replace(config, chunk_size=settings.chunk_size, output_size=settings.output_size)
    elif settings.vocab_size is not None:
        config = model_config(settings, settings.vocab_size, 0)
    else:
        tokenizer = train_tokenizer(settings, data.open_corpus(settings), console)
        config = _config(settings, tokenizer)
    return memory.table(config, settings)


def _config(settings: Settings, tokenizer: "Tokenizer") -> ModelConfig:
    from ysnake.text.tokenizer import eot_id

    return model_config(settings, tokenizer.get_vocab_size(), eot_id(tokenizer))


def train_tokenizer(settings: Settings, corpus: "Corpus", console: "Console") -> "Tokenizer":
    """Train the tokenizer on the training documents, with the requested size."""
    from ysnake.text import data
    from ysnake.text import tokenizer as tokenizers

    wanted = settings.vocab_size or PRESETS[settings.preset].max_vocab
    with progress(console) as show:

        def texts() -> Iterator[str]:
            advance = counted(show, corpus.size, "reading for the vocabulary")
            for part in data.split(corpus.pieces()):
                if not part.held_out:
                    yield part.text
                advance(len(part.text))
            show(1.0, "choosing the entries of the vocabulary")

        tokenizer = tokenizers.train(settings.tokenizer or "bpe", texts(), wanted)
    size = tokenizer.get_vocab_size()
    if size < wanted and settings.vocab_size is not None:
        raise InputError(
            f"{wanted} cannot be met, these documents give {size}", field="--vocab-size"
        )
    if size < wanted:
        console.print(f"vocabulary: {size:,} entries, all that these documents give")
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
        frame = config.check_frame()
        return data.write_tokens(corpus.pieces(), tokenizer, *frame, folder, advance)
