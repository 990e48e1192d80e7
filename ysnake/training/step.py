"""One step of training: the loss of its batches, their gradient, and the optimizer's update."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ysnake.training import parallel
from ysnake.training.optimizer import make_moments
from ysnake.training.options import Settings
from ysnake.training.precision import autocast
from ysnake.training.replay import Replays
from ysnake.training.run import MEAN_OVER, Progress, Run, forget_carried
from ysnake.training.signals import Stop

if TYPE_CHECKING:
    from torch import Tensor

    from ysnake.model.network import State
    from ysnake.text.data import Batch

CLIP = 1.0  # largest norm of a step's gradient
DECAY_TO = 0.1  # the learning rate ends at this part of its peak


def learning_rate(settings: Settings, progress: Progress) -> float:
    """The rate of --schedule over the steps or the time limit, times a linear warm-up."""
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup_steps))
    if settings.max_steps is not None:
        done = progress.step / settings.max_steps
    else:
        assert settings.max_minutes is not None  # one of the two is set
        done = progress.elapsed / (60 * settings.max_minutes)
    done = min(done, 1.0)
    if settings.schedule == "linear":
        return settings.lr * warm * (1 - done)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return settings.lr * warm * (DECAY_TO + (1 - DECAY_TO) * cosine)


def batch_loss(
    run: Run, ids: "Tensor", targets: "Tensor", seq_idx: "Tensor | None", state: "State | None"
) -> "Tensor":
    """The summed loss of windows on the run's device, in nats."""
    with autocast(run.settings.precision, run.device):
        return run.loss(ids, targets, seq_idx, state)


def warm_up_warning(settings: Settings) -> str | None:
    """A line for the user if the learning rate cannot reach its peak."""
    if settings.max_steps is None or settings.max_steps > settings.warmup_steps:
        return None
    return (
        f"warning: the learning rate does not reach its peak, since --max-steps "
        f"{settings.max_steps} is not above --warmup-steps {settings.warmup_steps}"
    )


def windows(run: Run, batch: "Batch") -> "tuple[Tensor, Tensor, Tensor | None]":
    """ids, targets and seq_idx of this rank's part of a batch, on the run's device."""
    import torch

    batch = run.ranks.own_part(batch)
    ids, targets = (torch.from_numpy(t).to(run.device) for t in (batch.ids, batch.targets))
    if (batch.seq_idx == batch.seq_idx[:, :1]).all():
        return ids, targets, None  # one document in each window
    return ids, targets, torch.from_numpy(batch.seq_idx).to(run.device)


def add_gradients(run: Run, given: Sequence[Any]) -> "list[Tensor]":
    """Add the gradient of one batch of a step to the gradients of the weights.

    Args:
        given: ids, targets, seq_idx, the targets of the whole step, then each layer's convolution
            and scan state, if the state is carried.

    Returns:
        The batch's part of the step's loss, and the states after it.
    """
    from ysnake.model.network import LayerState

    ids, targets, seq_idx, n_targets, *states = given
    pairs = zip(states[::2], states[1::2], strict=True)
    state = [LayerState(conv, ssm) for conv, ssm in pairs] or None
    loss = batch_loss(run, ids, targets, seq_idx, state) / n_targets
    (loss * run.ranks.size).backward()  # the ranks average their gradients, and we need the sum
    return [loss.detach(), *(t for layer in state or () for t in (layer.conv, layer.ssm))]


def prepare(run: Run) -> None:
    """What the first step needs: the moments of the optimizer, and CUDA graphs on one GPU."""
    make_moments(run.optimizer)
    if not run.settings.no_graphs and run.device.type == "cuda" and run.ranks.size == 1:
        run.replays = Replays(partial(add_gradients, run))


def train_step(run: Run, stop: Stop) -> dict[str, float | None] | None:
    """Take one step of the optimizer. None if a stop was requested; then nothing has changed."""
    import torch

    from ysnake.model.network import LayerState
    from ysnake.text import data

    settings, progress = run.settings, run.progress
    first = progress.step * settings.accumulate
    cut = (run.train, settings.seq_len, settings.batch_size)
    indices = range(first, first + settings.accumulate)
    state: State | None = None
    if run.carried is not None:
        batches = [data.consecutive_windows(*cut, i) for i in indices]
        state = [LayerState(layer.conv, layer.ssm) for layer in run.carried]
    else:
        batches = [data.training_windows(*cut, i, settings.seed) for i in indices]
    n_targets = max(1.0, sum(batch.n_targets for batch in batches))
    all_targets = torch.tensor(n_targets, dtype=torch.float32, device=run.device)

    run.optimizer.zero_grad(set_to_none=run.replays is None)  # a graph adds to the same tensors
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches, 1):
        if run.ranks.any(stop.requested):
            return None
        for layer in state or ():  # rows whose window begins a document start from zeros
            keep = torch.from_numpy(~run.ranks.own_part(batch).starts_anew).to(layer.conv)
            layer.conv = layer.conv * keep[:, None, None]
            layer.ssm = layer.ssm * keep[:, None, None, None].to(layer.ssm)
        with run.ranks.gradient_exchange(run.loss, now=i == len(batches)):
            before = [t for layer in state or () for t in (layer.conv, layer.ssm)]
            given = [*windows(run, batch), all_targets, *before]
            share, *after = run.replays(given) if run.replays else add_gradients(run, given)
        for layer, conv, ssm in zip(state or (), after[::2], after[1::2], strict=True):
            layer.conv, layer.ssm = conv, ssm
        total += share
    loss = run.ranks.total(total)
    norm = parallel.number(torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP))

    lr = learning_rate(settings, progress)
    if math.isfinite(loss) and math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        run.carried = state
        progress.skipped_in_a_row = 0
        progress.recent = [*progress.recent, loss][-MEAN_OVER:]
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        forget_carried(run)  # the state may contain the cause
    progress.step += 1
    progress.tokens += settings.accumulate * settings.batch_size * settings.seq_len
    return {"train_loss": loss, "lr": lr, "grad_norm": norm}
