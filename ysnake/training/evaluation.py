"""Evaluation while training: the held-out loss, the best checkpoint, and a sample of text."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ysnake.inference.score import DROPPED
from ysnake.shared import cli
from ysnake.shared.shown import escape_controls
from ysnake.training import step
from ysnake.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console

    from ysnake.model.network import Model

VAL_TOKENS = 1 << 15  # held-out tokens that an evaluation while training uses
DROPPED_SHARE = "val.dropped"  # a file in data/: the share of held-out bytes without a token
LEAST_LENGTH = 256  # tokens of an evaluation's window, so that losses of all runs are comparable
SAMPLE_PROMPT, SAMPLE_TOKENS = 32, 96


def held_out_loss(run: Run, tell: Callable[[str], None]) -> dict[str, float | None]:
    """The loss on held-out text, as `val_loss` in nats per token and as `bits_per_byte`.

    Both are None if nothing is held out. At most VAL_TOKENS are read, in windows at equal
    distances. The length of a window is the smallest multiple of `seq_len` that is at least
    LEAST_LENGTH. It is at most VAL_TOKENS or the number of held-out tokens, but not below
    LEAST_LENGTH.

    The bytes are those of the decoded targets, and an estimate of the bytes that the tokenizer
    drops, from the dropped share of all held-out text. Each dropped byte counts as in `score`.
    `tell` is called with a text that says how far the evaluation is.
    """
    import torch

    from ysnake.text import data
    from ysnake.text.tokenizer import decode

    settings = run.settings
    times = -(-LEAST_LENGTH // settings.seq_len)  # rounded up
    seq_len, batch_size = times * settings.seq_len, max(1, settings.batch_size // times)
    n_tokens, n_read = min(len(run.val), VAL_TOKENS), 0
    longest = max(LEAST_LENGTH, n_tokens)
    if seq_len > longest:
        seq_len = -(-longest // run.ranks.context) * run.ranks.context  # can be split evenly
    loss, predicted = torch.zeros((), dtype=torch.float64), list[int]()
    with torch.no_grad():
        for batch in data.held_out_windows(run.val, seq_len, batch_size, VAL_TOKENS):
            loss += step.batch_loss(run, *step.windows(run, batch), None).item()
            predicted += batch.predicted.tolist()
            n_read += batch.ids.size
            tell(f"evaluating {min(1.0, n_read / n_tokens):.0%}")
    if not predicted:
        return {"val_loss": None, "bits_per_byte": None}
    nats = run.ranks.total(loss)
    text = decode(run.tokenizer, predicted)
    given_back = len(text.encode("utf-8", "replace"))
    path = run.folder / "data" / DROPPED_SHARE
    share = float(path.read_text()) if path.is_file() else 0.0
    dropped = given_back * share / (1 - share) if share < 1 else 0.0
    bits = (nats / math.log(2) + DROPPED * dropped) / max(1, given_back + dropped)
    return {"val_loss": nats / len(predicted), "bits_per_byte": bits}


def sample(run: Run, model: "Model", number: int) -> tuple[str, str]:
    """A prompt from the middle of a training document, and its continuation by the model."""
    from ysnake.inference.generate import Context, Sampling
    from ysnake.text import data
    from ysnake.text.tokenizer import decode

    length = min(SAMPLE_PROMPT, max(1, len(run.train) // 8))
    middles = data.middles(run.train, length) or [run.train.ids[1 : 1 + length].tolist()]
    prompt = middles[number % len(middles)]
    context = Context(model, run.tokenizer.get_vocab_size())
    bos, _ = model.config.document_tokens()
    context.feed([bos, *prompt])
    written = list(context.generate(Sampling(temperature=0), SAMPLE_TOKENS))
    model.train()
    return decode(run.tokenizer, prompt), decode(run.tokenizer, written)


def evaluate(run: Run, console: "Console", tell: Callable[[str], None]) -> dict[str, float | None]:
    """Measure the held-out loss, write best/ if it is the best so far, and show a sample.

    Returns what `held_out_loss` measures. `tell` is called with what is done at the moment.
    """
    from ysnake.checkpoints import checkpoint

    progress = run.progress
    measured = held_out_loss(run, tell)
    tell("writing a sample")
    loss = measured["val_loss"]
    better = False
    if loss is not None and math.isfinite(loss):
        better = progress.best_loss is None or loss < progress.best_loss
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        progress.best_loss = loss if better else progress.best_loss
        progress.evaluations += 1
    model = run.ranks.gathered_model(run.model)

    def write() -> None:
        assert model is not None  # on the first rank
        if better:
            kept = run.tokenizer_settings
            checkpoint.save(run.folder / "best", model, run.tokenizer, tokenizer_settings=kept)
        prompt, written = sample(run, model, progress.step // run.settings.eval_every)
        held_out = "" if loss is None else f", held-out loss {loss:.3f}"
        head = f"step {progress.step}: loss {progress.mean_loss:.3f}{held_out}"
        samples = run.folder / "samples.txt"
        with cli.file_errors(samples), samples.open("a", encoding="utf-8") as file:
            file.write(escape_controls(f"{head}\n{prompt} >>> {written}\n\n", keep="\n\t"))
        progress.samples_size = samples.stat().st_size
        # On the screen line breaks are escaped too, so a sample cannot scroll everything away.
        console.print(f"[bold]{head}[/]\n[dim]{cli.markup(prompt)}[/]{cli.markup(written)}\n")

    run.ranks.on_first(write)
    return measured
