"""A training run: model, optimizer, tokens and progress, and how they are saved.

`new_run.start` makes a run, `resume.resume` reads one from disk, and `loop.fit` trains it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ysnake.shared import cli
from ysnake.shared.files import read_json, replacing
from ysnake.shared.run_files import RECENT
from ysnake.training.optimizer import make_optimizer
from ysnake.training.options import Settings
from ysnake.training.parallel import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from tokenizers import Tokenizer

    from ysnake.model.network import Model, State
    from ysnake.text.data import Tokens
    from ysnake.training.replay import Replays

KEPT_RECOMPUTING = 1 << 24  # with --recompute, the largest freed block that is kept, in bytes
MEAN_OVER = RECENT  # steps over which the training loss is averaged
SHARDS = ".optimizer.new"  # in a run folder: a sharded optimizer that becomes a part of last/
# what training appends to or replaces
WRITTEN = ("metrics.jsonl", "samples.txt", "loss.png", "tensorboard", "wandb", "wandb_id.txt")


@dataclass
class Progress:
    """The progress of a run. All of it is saved with checkpoints; plain values only."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0  # seconds of training
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last steps
    best_loss: float | None = None  # on held-out text
    evaluations: int = 0
    evaluations_since_best: int = 0
    samples_size: int | None = 0  # bytes of samples.txt; None in runs of earlier versions
    threads: int = 0
    processes: int = 1
    ended: str | None = None  # steps, time, loss, patience, interrupted or diverged

    @property
    def mean_loss(self) -> float:
        return sum(self.recent) / max(1, len(self.recent))


@dataclass
class Run:
    """Everything that a training run works with."""

    settings: Settings
    model: "Model"
    tokenizer: "Tokenizer"
    optimizer: "torch.optim.Optimizer"
    train: "Tokens"
    val: "Tokens"
    progress: Progress
    ranks: Ranks
    loss: "Callable[..., torch.Tensor]"  # of this rank's part of a batch
    carried: "State | None" = None  # with --carry-state: the state with which the next step starts
    replays: "Replays | None" = None  # on a GPU, of step.add_gradients
    tokenizer_settings: dict[str, str] = field(default_factory=dict)  # that checkpoints keep

    @property
    def folder(self) -> Path:
        return self.settings.folder

    @property
    def device(self) -> "torch.device":
        return self.model.backbone.embeddings.weight.device


def assemble(
    settings: Settings,
    model: "Model",
    tokenizer: "Tokenizer",
    progress: Progress,
    ranks: Ranks,
    device: str,
) -> Run:
    """A run with the tokens in its folder, and its model on the device."""
    from ysnake.text.data import Tokens

    vocabulary = (tokenizer.get_vocab_size(), *model.config.document_tokens())
    train, val = (
        Tokens.open(settings.folder / "data" / f"{side}.tokens", *vocabulary)
        for side in ("train", "val")
    )
    return with_tokens((train, val), settings, model, tokenizer, progress, ranks, device)


def with_tokens(
    tokens: "tuple[Tokens, Tokens]",
    settings: Settings,
    model: "Model",
    tokenizer: "Tokenizer",
    progress: Progress,
    ranks: Ranks,
    device: str,
) -> Run:
    """A run with these tokens: those to train on, and those held out."""
    import torch
    from ysnake_kernels.allocator import keep_freed_memory

    if settings.recompute:
        keep_freed_memory(KEPT_RECOMPUTING)
    else:
        keep_freed_memory()
    progress.threads, progress.processes = torch.get_num_threads(), ranks.size
    model.backbone.recompute = settings.recompute
    loss = ranks.distribute(model, device)
    how = (settings.weight_decay, settings.optimizer, settings.momentum, settings.beta2)
    optimizer = make_optimizer(model, *how)
    run = Run(settings, model, tokenizer, optimizer, *tokens, progress, ranks, loss)
    forget_carried(run)
    return run


def forget_carried(run: Run) -> None:
    if run.settings.carry_state:
        run.carried = run.model.empty_state(len(run.ranks.own_rows(run.settings.batch_size)))


def keep_good(run: Run) -> None:
    """After a run has diverged, make an earlier checkpoint last/ and set the bad one aside.

    The steps that were skipped at the end did not change the weights. So weights that were saved
    after the last applied step already give no finite loss.
    In last/ only progress.json changes: it says that the run has diverged.
    """
    from ysnake.checkpoints import checkpoint

    last, old = run.folder / "last", run.folder / "last.old"
    bad_from = run.progress.step - run.progress.skipped_in_a_row
    if saved_step(last) >= bad_from and old.is_dir() and saved_step(old) < bad_from:
        with cli.file_errors(run.folder):
            checkpoint.put_back(old, last)
    path = last / checkpoint.PROGRESS
    with replacing(path) as new:
        checkpoint.write_json(new, read_json(path) | {"ended": run.progress.ended})


def saved_step(folder: Path) -> int:
    """The step after which this checkpoint was saved."""
    from ysnake.checkpoints import checkpoint

    return read_json(folder / checkpoint.PROGRESS)["step"]


def save_last(run: Run) -> None:
    """Write last/: the model, and everything that resuming needs."""
    from ysnake.checkpoints import checkpoint

    ranks = run.ranks
    shards = run.folder / SHARDS
    training = {
        "optimizer": ranks.save_optimizer(run.model, run.optimizer, shards),
        "progress": asdict(run.progress),
        "corpus": (len(run.train), len(run.val)),
    }
    if run.carried is not None:
        training["carried"] = [
            (ranks.gather_rows(layer.conv), ranks.gather_rows(layer.ssm)) for layer in run.carried
        ]
    progress = {k: v for k, v in asdict(run.progress).items() if k != "recent"}
    progress["mean_loss"] = run.progress.mean_loss
    model = ranks.gathered_model(run.model)

    def write() -> None:
        assert model is not None  # on the first rank
        training["head"] = checkpoint.head_factors(model)
        parts = shards if ranks.sharded else None
        rest = (training, progress, parts, run.tokenizer_settings)
        checkpoint.save(run.folder / "last", model, run.tokenizer, *rest)

    ranks.on_first(write)
