"""The speed of training on this machine, measured with a few steps of the model itself."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ysnake.model.config import ModelConfig
from ysnake.shared import cli
from ysnake.shared.errors import InputError
from ysnake.training import memory
from ysnake.training.options import Settings
from ysnake.training.parallel import Ranks
from ysnake.training.precision import choose_precision, products_as
from ysnake.training.run import Progress, with_tokens
from ysnake.training.signals import Stop
from ysnake.training.step import prepare, train_step

if TYPE_CHECKING:
    from ysnake.text.data import Tokens

FIRST_STEPS = {"cuda": 3}  # not timed: these compile, capture or allocate; one elsewhere
MEASURED_SECONDS = 1.0


def measure_if_it_fits(settings: Settings, config: ModelConfig) -> float | None:
    """The same as `measure`. None if a step would take more memory than there is."""
    settings, device = replace(settings), cli.pick_device(settings.device)
    try:
        memory.choose_batch_size(settings, config)
        memory.check(settings, config, device)
    except InputError:
        return None
    return measure(settings, config)


def measure(settings: Settings, config: ModelConfig) -> float:
    """Tokens per second of training steps in one process.

    The steps train a model of their own on random tokens. Nothing is written.

    Args:
        settings: of the run whose speed is wanted.
        config: of its model.
    """
    import torch
    from rich.console import Console
    from tokenizers import Tokenizer, models

    from ysnake.model.network import Model

    tokenizer = Tokenizer(models.BPE())  # no step uses it
    with torch.random.fork_rng(devices=[]):  # a program's own random numbers stay as they are
        model = Model(config, settings.init, settings.zero_out)
    tokens = _random_tokens(config, settings)
    device = cli.pick_device(settings.device)
    run = with_tokens((tokens, tokens), settings, model, tokenizer, Progress(), Ranks(), device)
    prepare(run)
    stop, done = Stop(), 0
    precision, _ = choose_precision(settings.precision, run.device.type)
    with products_as(precision, run.device, Console(quiet=True)):
        for _ in range(FIRST_STEPS.get(run.device.type, 1)):
            train_step(run, stop)
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < MEASURED_SECONDS or not done:
            train_step(run, stop)
            done += 1
    return done * settings.accumulate * settings.batch_size * settings.seq_len / seconds


def _random_tokens(config: ModelConfig, settings: Settings) -> "Tokens":
    import numpy as np

    from ysnake.text.data import Tokens

    length = 8 * settings.batch_size * settings.seq_len
    ids = np.random.default_rng(0).integers(1, max(2, config.vocab_size), length)
    return Tokens(ids, 0, 0)
