"""`python -m ysnake.train`: train a model on documents, watch it learn, stop and resume at will.

Every batch is a function of the settings and the step, so a run that was stopped goes on as if it
never had been. The functions here can be called one by one; `main` only strings them together.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ysnake.shared import cli, run_lock
from ysnake.shared.shown import escape_controls
from ysnake.shared.waiting import sleep_soon
from ysnake.training import launch, parallel
from ysnake.training import settings as settings_of
from ysnake.training.new_run import plan, start
from ysnake.training.parallel import Ranks
from ysnake.training.plot import draw_loss
from ysnake.training.progress_bar import progress_bar
from ysnake.training.resume import resume
from ysnake.training.run import Progress, Run, forget_carried, keep_good, make_moments, save_last
from ysnake.training.settings import Settings
from ysnake.training.stopping import MEAN_OVER, Stop, reason_to_end, summary

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ysnake.model.network import Model, State
    from ysnake.text.data import Batch

VAL_TOKENS = 1 << 15  # held-out tokens looked at while training
CLIP = 1.0  # largest norm of a step's gradient
DECAY_TO = 0.1  # the learning rate ends at this part of its peak
SAMPLE_PROMPT, SAMPLE_TOKENS = 32, 96


@contextmanager
def open_run(settings: Settings, ranks: Ranks, console: "Console") -> Iterator[Run]:
    """The run that the settings mean, on every rank: a new one, or one to go on with.

    No other process trains it as long as the block runs.
    """
    run = None
    if not settings.resume:
        run = ranks.alone(lambda: start(settings, console))
        settings.run = ranks.as_first(settings.run)
    busy = f"{settings.run}: another process is training this run"
    with ExitStack() as held:

        def own() -> None:
            with cli.writing(settings.run):
                held.enter_context(run_lock.lock(settings.run / run_lock.TRAINING, busy))

        ranks.alone(own)
        yield run if run and ranks.size == 1 else resume(settings, ranks, console)


def learning_rate(settings: Settings, progress: Progress) -> float:
    """Linear warm-up, then a cosine down to a tenth, over the steps or else over the clock."""
    warm = min(1.0, (progress.step + 1) / max(1, settings.warmup_steps))
    if settings.max_steps is not None:
        done = progress.step / settings.max_steps
    else:
        done = progress.elapsed / (60 * settings.max_minutes)
    cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return settings.lr * warm * (DECAY_TO + (1 - DECAY_TO) * cosine)


def batch_loss(run: Run, batch: "Batch", state: "State | None" = None) -> "torch.Tensor":
    """Summed loss of this rank's part of a batch, in nats."""
    import torch

    batch = run.ranks.part(batch)
    ids, targets, seq_idx = (
        torch.from_numpy(array).to(run.device)
        for array in (batch.ids, batch.targets, batch.seq_idx)
    )
    if bool((seq_idx == seq_idx[:, :1]).all()):
        seq_idx = None  # one document in each window
    precision = run.settings.precision
    lower = precision == "bfloat16" or (precision == "auto" and run.device.type == "cuda")
    autocast = torch.autocast(run.device.type, torch.bfloat16) if lower else nullcontext()
    with autocast:
        return run.loss(ids, targets, seq_idx, state)


def train_step(run: Run, stop: Stop) -> dict[str, float] | None:
    """One step of the optimiser. None if a stop was asked for: then nothing has changed."""
    import torch

    from ysnake.model.network import LayerState
    from ysnake.text import data

    settings, progress = run.settings, run.progress
    first = progress.step * settings.accumulate
    cut = (run.train, settings.seq_len, settings.batch_size)
    indices = range(first, first + settings.accumulate)
    if settings.carry_state:
        batches = [data.consecutive_windows(*cut, i) for i in indices]
        state = [LayerState(layer.conv, layer.ssm) for layer in run.carried]
    else:
        batches = [data.training_windows(*cut, i, settings.seed) for i in indices]
        state = None
    n_targets = max(1, sum(batch.n_targets for batch in batches))

    run.optimizer.zero_grad()
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches, 1):
        if run.ranks.any(stop.requested):
            return None
        for layer in state or ():  # lanes whose window begins a document forget
            keep = torch.from_numpy(~run.ranks.part(batch).starts_anew).to(layer.conv)
            layer.conv = layer.conv * keep[:, None, None]
            layer.ssm = layer.ssm * keep[:, None, None, None].to(layer.ssm)
        with run.ranks.exchanging(run.loss, now=i == len(batches)):
            loss = batch_loss(run, batch, state) / n_targets
            (loss * run.ranks.size).backward()  # ranks average, and here is a share of the loss
        total += loss.detach()
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
        forget_carried(run)  # what made the step fail may be in the state
    progress.step += 1
    progress.tokens += settings.accumulate * settings.batch_size * settings.seq_len
    return {"train_loss": loss, "lr": lr, "grad_norm": norm}


def held_out_loss(run: Run) -> float | None:
    """Mean loss on held-out text, nats per token; None if nothing is held out."""
    import torch

    from ysnake.text import data

    settings = run.settings
    loss, n_targets = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in data.held_out_windows(
            run.val, settings.seq_len, settings.batch_size, VAL_TOKENS
        ):
            loss += batch_loss(run, batch).item()
            n_targets += batch.n_targets
    return run.ranks.total(loss) / n_targets if n_targets else None


def sample(run: Run, model: "Model", number: int) -> tuple[str, str]:
    """A prompt from the middle of a training document, and the model's own continuation."""
    from ysnake.inference.generate import Context, Sampling
    from ysnake.text import data
    from ysnake.text.tokenizer import decode

    length = min(SAMPLE_PROMPT, max(1, len(run.train) // 8))
    middles = data.middles(run.train, length) or [run.train.ids[1 : 1 + length].tolist()]
    prompt = middles[number % len(middles)]
    context = Context(model, run.tokenizer.get_vocab_size())
    context.feed([model.config.bos_id, *prompt])
    written = list(context.generate(Sampling(temperature=0), SAMPLE_TOKENS))
    model.train()
    return decode(run.tokenizer, prompt), decode(run.tokenizer, written)


def evaluate(run: Run, console: "Console") -> float | None:
    """Held-out loss, best/ if it is the best so far, and a sample of text."""
    from ysnake.checkpoints import checkpoint

    progress = run.progress
    loss = held_out_loss(run)
    better = False
    if loss is not None and math.isfinite(loss):
        better = progress.best_val_loss is None or loss < progress.best_val_loss
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        progress.best_val_loss = loss if better else progress.best_val_loss
        progress.evaluations += 1
    model = run.ranks.whole(run.model)

    def write() -> None:
        if better:
            checkpoint.save(run.folder / "best", model, run.tokenizer)
        prompt, written = sample(run, model, progress.step // run.settings.eval_every)
        held_out = "" if loss is None else f", held-out loss {loss:.3f}"
        head = f"step {progress.step}: loss {progress.mean_loss:.3f}{held_out}"
        samples = run.folder / "samples.txt"
        with cli.writing(samples), samples.open("a", encoding="utf-8") as file:
            file.write(escape_controls(f"{head}\n{prompt} >>> {written}\n\n", keep="\n\t"))
        # On the screen line breaks are escaped too: a sample never scrolls the rest away.
        console.print(f"[bold]{head}[/]\n[dim]{cli.markup(prompt)}[/]{cli.markup(written)}\n")

    run.ranks.alone(write)
    return loss


def fit(run: Run, stop: Stop, console: "Console") -> None:
    """Train until there is a reason to end; leaves last/, metrics and picture complete."""
    settings, progress = run.settings, run.progress
    speeds: deque[float] = deque(maxlen=MEAN_OVER)
    n_tokens = settings.accumulate * settings.batch_size * settings.seq_len
    path = run.folder / "metrics.jsonl" if run.ranks.first else Path(os.devnull)
    make_moments(run.optimizer)
    with (
        cli.writing(path),
        path.open("a", buffering=1) as metrics,
        progress_bar(run, console) as show,
    ):

        def sync() -> None:
            if run.ranks.first:
                os.fsync(metrics.fileno())

        while progress.ended is None:
            began = time.perf_counter()
            line = train_step(run, stop)
            if line is None:
                progress.ended = "interrupted"
                break
            seconds = run.ranks.as_first(max(0.0, time.perf_counter() - began))
            speed = n_tokens / seconds if seconds else None  # a clock may be coarse, or stand still
            speeds.extend([speed] if seconds else [])
            progress.elapsed += seconds
            progress.ended = reason_to_end(run)
            line = {"step": progress.step, "tokens": progress.tokens, **line}
            line |= {"tokens_per_s": speed, "skipped": progress.skipped}
            if progress.step % settings.eval_every == 0 or progress.ended:
                began = time.perf_counter()
                line["val_loss"] = evaluate(run, console)
                progress.elapsed += run.ranks.as_first(max(0.0, time.perf_counter() - began))
                progress.ended = progress.ended or reason_to_end(run)
            finite = {k: v if v is not None and math.isfinite(v) else None for k, v in line.items()}
            metrics.write(json.dumps(finite) + "\n")
            show(sum(speeds) / max(1, len(speeds)))
            if "val_loss" in line and run.ranks.first:
                draw_loss(run.folder, console)
            good = progress.ended is None and not progress.skipped_in_a_row
            if progress.step % settings.checkpoint_every == 0 and good:
                sync()
                save_last(run)
        sync()
    if progress.ended == "diverged":
        run.ranks.alone(lambda: keep_good(run))
    else:
        save_last(run)
    run.ranks.alone(lambda: draw_loss(run.folder, console))


def main(argv: list[str]) -> int:
    """Train as the command line says; returns the exit code."""
    sleep_soon()
    with launch.heard_once():
        settings = settings_of.parse(launch.restarted(argv))
        launch.check(settings)
        if settings.plan:
            console = cli.console()
            console.print(plan(settings, console))
            return cli.DONE
        cli.use_threads(settings.threads)
    with parallel.joined(settings) as ranks:
        return _train(settings, ranks)


def _train(settings: Settings, ranks: Ranks) -> int:
    console = cli.console()
    console.quiet = not ranks.first
    stop = Stop()
    with open_run(settings, ranks, console) as run, stop.listening():
        if settings.resume:
            run.progress.ended = run.progress.ended and reason_to_end(run)
        fit(run, stop, console)
    progress = run.progress
    console.print(summary(run))
    return {"interrupted": cli.INTERRUPTED, "diverged": cli.FAILED}.get(progress.ended, cli.DONE)


if __name__ == "__main__":
    cli.run(main)
