"""The case `quality` of `benchmarks.compare`: models that train for the same time on the same text.

Three models with the same number of parameters train one after another. They get the same batches
in the same order, the same optimizer, and a learning rate that follows the clock. They are compared
by the loss per byte on held-out text. `python -m benchmarks.quality JOB` trains one of them.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare_report import GPT2, HF, YSNAKE
from benchmarks.contestants import gpt2, memory, saved
from ysnake.model.config import IGNORED
from ysnake.shared.errors import InputError
from ysnake.training.options import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from ysnake.text.data import Batch, Tokens

SEQ_LEN, BATCH_SIZE, WARMUP_STEPS, WEIGHT_DECAY = 256, 8, 100, 0.1
EVALUATIONS = 10
LEAST = 1_000_000  # bytes; with less text the result means nothing
# contestant -> modules that it needs
NAMES = {YSNAKE: (), HF: ("transformers",), GPT2: ("transformers",)}


@dataclass
class Corpus:
    """The text as all models get it."""

    folder: Path
    sizes: dict[str, int]
    held_out_bytes: int  # of the tokens that are predicted
    eot_id: int  # the token that begins and ends a document


def prepare(text: Path | None, folder: Path, sizes: dict[str, int], quick: bool) -> Corpus:
    """Tokenizer and tokens of the text.

    Raises:
        InputError: there is no text, or too little of it.
    """
    if text is None:
        raise InputError(
            "--text: quality needs a file with several megabytes of text (.txt, .md or .jsonl)"
        )
    from ysnake.text import data, tokenizer
    from ysnake.training.evaluation import VAL_TOKENS

    corpus = data.Corpus(data.find_files([text]))
    size = corpus.size
    if size < LEAST and not quick:
        raise InputError(f"--text: expected at least {LEAST:,} bytes, {text} has {size:,}")
    texts = (part.text for part in data.split(corpus.pieces()) if not part.held_out)
    learnt = tokenizer.train("bpe", texts, sizes["vocab_size"])
    eot_id, entries = tokenizer.eot_id(learnt), learnt.get_vocab_size()
    folder.mkdir()
    data.write_tokens(corpus.pieces(), learnt, eot_id, eot_id, folder, lambda characters: None)
    held_out = data.Tokens.open(folder / "val.tokens", entries, eot_id, eot_id)
    predicted: list[int] = []
    for batch in data.held_out_windows(held_out, SEQ_LEN, BATCH_SIZE, VAL_TOKENS):
        predicted += batch.predicted.tolist()
    size = len(tokenizer.decode(learnt, predicted).encode())
    return Corpus(folder, sizes, size, eot_id)


def measure(
    corpus: Corpus, minutes: float, lr: float, worker: Callable, show: Callable[[str], None]
) -> dict:
    """A group of rows, as of the other cases. `worker(module, job)` starts a process."""
    rows = []
    for name, needs in NAMES.items():
        row = {"by": name, "curve": []}
        rows.append(row)
        if missing := [module for module in needs if find_spec(module) is None]:
            row["absent"] = f"{', '.join(missing)} not installed"
            continue
        job = {"name": name, "minutes": minutes, "lr": lr}
        job |= {k: str(v) if k == "folder" else v for k, v in vars(corpus).items()}
        show(f"{name} learns")
        process = worker("benchmarks.quality", job)
        try:
            while not row.get("done"):
                row |= process.answer()
                row["curve"].append([row["minutes"], row["loss_per_byte"]])
                show(f"{name}: {row['loss_per_byte']:.4f} nats per byte after {row['steps']} steps")
        except RuntimeError as error:
            row["failed"] = str(error)
        finally:
            process.end()
    title = f"Quality: held-out loss after {minutes:g} minutes, {BATCH_SIZE} x {SEQ_LEN} tokens"
    return {"title": title, "rows": rows, "memory": "peak", "bases": []}


def train(job: dict, report: Callable[[dict], None]) -> None:
    """Train one of the models. Calls `report` with its figures at intervals and at the end."""
    import torch

    from ysnake.text import data
    from ysnake.training.optimizer import make_optimizer
    from ysnake.training.run import Progress
    from ysnake.training.step import CLIP, learning_rate

    folder, eot_id = Path(job["folder"]), job["eot_id"]
    learn, held_out = (
        data.Tokens.open(folder / f"{side}.tokens", job["sizes"]["vocab_size"], eot_id, eot_id)
        for side in ("train", "val")
    )
    model, loss_of = _model(job)
    settings = Settings(lr=job["lr"], warmup_steps=WARMUP_STEPS, max_minutes=job["minutes"])
    optimizer, progress = make_optimizer(model, WEIGHT_DECAY), Progress()
    reported = 0  # evaluations so far
    while progress.elapsed < 60 * job["minutes"]:
        start = time.monotonic()
        batch = data.training_windows(learn, SEQ_LEN, BATCH_SIZE, progress.step, 0)
        optimizer.zero_grad()
        (loss_of(batch) / batch.n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, progress)
        optimizer.step()
        progress.step += 1
        progress.elapsed += time.monotonic() - start
        done = progress.elapsed / (60 * job["minutes"])
        if done >= (reported + 1) / EVALUATIONS:
            reported = int(done * EVALUATIONS)
            tokens = progress.step * BATCH_SIZE * SEQ_LEN
            report(
                {
                    **{"minutes": progress.elapsed / 60, "steps": progress.step},
                    **{"tokens_per_s": tokens / progress.elapsed, "done": done >= 1},
                    **{"loss_per_byte": _held_out(held_out, loss_of, job), "peak": memory("VmHWM")},
                    "parameters": sum(p.numel() for p in model.parameters()),
                }
            )


def _held_out(tokens: "Tokens", loss_of: Callable[["Batch"], "Tensor"], job: dict) -> float:
    import torch

    from ysnake.text import data
    from ysnake.training.evaluation import VAL_TOKENS

    with torch.no_grad():
        windows = data.held_out_windows(tokens, SEQ_LEN, BATCH_SIZE, VAL_TOKENS)
        return sum(loss_of(batch).item() for batch in windows) / job["held_out_bytes"]


def _model(job: dict) -> tuple[Any, Callable[["Batch"], "Tensor"]]:
    """A model, and its summed loss on a batch.

    The documents of a window are not separated, since transformers' models cannot do that.
    """
    import torch
    import torch.nn.functional as F
    from ysnake_kernels.allocator import keep_freed_memory

    from ysnake.checkpoints import checkpoint

    folder = saved(f"{job['folder']}/model", job["sizes"])
    ours = checkpoint.load(folder)
    if job["name"] == YSNAKE:
        keep_freed_memory()  # as ysnake.train does
        return ours, lambda batch: ours.loss(*map(torch.from_numpy, (batch.ids, batch.targets)))

    if job["name"] == GPT2:
        one, two = (
            sum(p.numel() for p in gpt2(job["sizes"], SEQ_LEN, n_inner=n).parameters())
            for n in (1, 2)
        )
        n_inner = 1 + (ours.n_parameters() - one) // (two - one)  # as many parameters as ours
        model = gpt2(job["sizes"], SEQ_LEN, n_inner=n_inner)
    else:
        from transformers import Mamba2ForCausalLM

        model = Mamba2ForCausalLM.from_pretrained(folder)
    model.train()

    def loss_of(batch: "Batch") -> "Tensor":
        logits = model(torch.from_numpy(batch.ids), use_cache=False).logits
        targets = torch.from_numpy(batch.targets).flatten()
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")

    return model, loss_of


def main() -> None:
    """One line of JSON for each evaluation."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries must not look like an answer
    train(json.loads(sys.argv[1]), lambda figures: answers.write(json.dumps(figures) + "\n"))


if __name__ == "__main__":
    main()
