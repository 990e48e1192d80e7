"""What `--size` tells at the start: what it has chosen, and what to expect of the training."""

import math

from ysnake.model.config import ModelConfig
from ysnake.shared.shown import amount
from ysnake.training.options import Settings
from ysnake.training.size import MEASURED_ON, SIZES


def lines(settings: Settings, config: ModelConfig, n_tokens: float, speed: float) -> list[str]:
    """Two lines for the user about a new run with --size.

    Args:
        settings: of the run.
        config: of its model.
        n_tokens: of the text to train on.
        speed: tokens of training per second, measured.
    """
    of_a_step = settings.accumulate * settings.batch_size * settings.seq_len
    tokens, end = math.inf, []
    if settings.max_steps is not None:
        tokens = settings.max_steps * of_a_step
        end.append(amount(settings.max_steps, "step"))
    if settings.max_minutes is not None:
        tokens = min(tokens, 60 * settings.max_minutes * speed)
        end.append(_time(settings.max_minutes))
    if settings.patience is not None:
        end.append(f"{amount(settings.patience, 'evaluation')} without a better held-out loss")
    minutes, passes = tokens / speed / 60, tokens / max(1, n_tokens)
    return [
        f"--size {settings.size}: {amount(config.n_layers, 'layer')} of width {config.d_model}, "
        f"a vocabulary of {config.vocab_size:,}; "
        f"{settings.optimizer} at a peak rate of {settings.lr:g}; "
        f"{settings.batch_size * settings.accumulate} x {settings.seq_len} tokens a step; "
        f"ends after {' or '.join(end)}",
        f"expect about {_time(minutes)} at {speed:,.0f} tokens/s, measured here: "
        f"{tokens / 1e6:,.2f} million tokens, {passes:.1f} passes over the text"
        + _loss(settings, tokens),
    ]


def _time(minutes: float) -> str:
    """A time in the unit that suits it."""
    if minutes < 1.5:
        return f"{60 * minutes:.0f} seconds"
    if minutes < 120:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def _loss(settings: Settings, tokens: float) -> str:
    """The held-out loss that was measured after about so many tokens or fewer, if there is one."""
    assert settings.size is not None
    reached = [point for point in SIZES[settings.size].measured if point[0] <= 1.3 * tokens]
    if not reached:
        return ""
    seen, nats = max(reached)
    return (
        f"; on {MEASURED_ON} this size had a held-out loss of {nats:.2f} nats "
        f"({nats / math.log(2):.2f} bits) per byte after {seen / 1e6:.2g} million tokens"
    )
