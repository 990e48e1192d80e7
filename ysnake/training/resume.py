"""Resuming a training run exactly where its last checkpoint was saved."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ysnake.model.config import ModelConfig
from ysnake.shared import cli, files, manifest
from ysnake.shared.errors import InputError
from ysnake.shared.shown import amount
from ysnake.training import evaluation, memory, parallel
from ysnake.training import settings as settings_of
from ysnake.training.options import Settings
from ysnake.training.parallel import Ranks
from ysnake.training.run import SHARDS, WRITTEN, Progress, Run, assemble
from ysnake.training.stopping import replace_limits

# Names of the best loss in earlier versions. The first was measured on the first held-out windows,
# the second on windows from all documents.
BEST_OF_EARLIER = ("best_val_loss", "best_held_out_loss")

if TYPE_CHECKING:
    from rich.console import Console
    from tokenizers import Tokenizer

    from ysnake.model.network import Model


def resume(settings: Settings, ranks: Ranks, console: "Console") -> Run:
    """Read the run in settings.run from its last/, or from the one before if that is damaged."""
    import torch

    from ysnake.checkpoints import checkpoint

    folder = settings.folder / "last"
    stored = settings_of.read(settings.folder)
    ranks.on_first(lambda: _verify_tokens(settings.folder / "data"))
    last, saved, model, tokenizer = ranks.on_all(lambda: _read_last(settings.folder))
    best_is_old = any(name in saved["progress"] for name in BEST_OF_EARLIER)
    try:
        run = _resumed(settings, ranks, last, saved, model, tokenizer, console)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if (
            isinstance(error, InputError | torch.AcceleratorError)
            or parallel.lost_contact(error)
            or cli.out_of_memory(error)
        ):
            raise
        path = last / checkpoint.STATE
        said = str(error).partition("\n")[0]
        raise InputError(f"{path}: not the state of this training run ({said})") from error

    def settle() -> None:
        with cli.file_errors(settings.folder):
            if last != folder:
                checkpoint.put_back(last, folder)
            files.remove_unfinished(settings.folder)
            if best_is_old and run.progress.best_loss is None:
                _keep_best(settings.folder, console)
            shutil.rmtree(settings.folder / SHARDS, ignore_errors=True)
            settings_of.write(settings)  # including what this command line has changed
            _forget_metrics_after(run.folder / "metrics.jsonl", run.progress.step)
            _forget_samples_after(run.folder / "samples.txt", run.progress.samples_size)

    if settings.resume:
        # When all ranks are here, every rank has read its files.
        for line in ranks.on_all(lambda: replace_limits(settings, stored, run.progress)):
            console.print(line)
        ranks.on_first(settle)
        console.print(
            f"[bold]{cli.markup(run.folder)}[/]: continues after step {run.progress.step}"
        )
    return run


def _progress(saved: dict[str, Any], settings: Settings) -> Progress:
    """The stored progress.

    It keeps the best loss of an earlier version only if later losses can be compared with it.
    """
    saved = {"samples_size": None} | saved
    old = {name: saved.pop(name) for name in BEST_OF_EARLIER if name in saved}
    same_windows = evaluation.LEAST_LENGTH <= settings.seq_len <= evaluation.VAL_TOKENS
    if same_windows and "best_held_out_loss" in old:
        saved["best_loss"] = old["best_held_out_loss"]
    if old and "best_loss" not in saved:
        saved["evaluations_since_best"] = 0
    progress = Progress(**saved)
    if progress.samples_size is not None:
        progress.samples_size = int(progress.samples_size)
    return progress


def _keep_best(folder: Path, console: "Console") -> None:
    """Copy best/ beside it. The next evaluation replaces it, since the losses do not compare."""
    kept = folder / "best.earlier"
    if (folder / "best").is_dir() and not kept.exists():
        shutil.copytree(folder / "best", kept)
        console.print(
            "This version measures the held-out loss in other windows. So the search for the best "
            f"checkpoint begins again. {kept} keeps the best one so far.",
            markup=False,
        )


def _verify_tokens(folder: Path) -> None:
    """Raise InputError if the tokens on disk have changed since the run started."""
    for path in sorted(folder.glob("*.tokens")):
        manifest.verify(path)


def _read_last(folder: Path) -> tuple[Path, dict[str, Any], "Model", "Tokenizer"]:
    from ysnake.checkpoints import checkpoint
    from ysnake.text import chat_template

    def read(last: Path) -> tuple[dict[str, Any], "Model", "Tokenizer"]:
        saved, model = checkpoint.load_training(last), checkpoint.load(last)
        tokenizer = checkpoint.load_tokenizer(last)
        return saved | {"tokenizer_settings": chat_template.kept(last)}, model, tokenizer

    for name in WRITTEN:
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: a link; a run writes into its folder only")
    last, found = checkpoint.newest_good(folder / "last", read)
    return last, *found


def _resumed(
    settings: Settings,
    ranks: Ranks,
    last: Path,
    saved: dict[str, Any],
    model: "Model",
    tokenizer: "Tokenizer",
    console: "Console",
) -> Run:
    """Restore the run from what its checkpoint contains."""
    from ysnake.checkpoints import checkpoint

    config = own_config(model.config, settings)
    if config.output_size is not None:
        model = checkpoint.with_factors(model, saved["head"], config.output_size)
    model.use_config(config)
    progress = _progress(saved["progress"], settings)
    device = cli.pick_device(settings.device)
    ranks.on_all(lambda: memory.check(settings, model.config, device))
    before, now = _workers(progress.processes, progress.threads), _workers(ranks.size)
    if before != now and settings.resume:
        console.print(
            f"warning: started with {before}, continues with {now}; the weights will differ in the "
            "last bits"
        )
    if progress.ended in ("interrupted", "diverged"):
        progress.ended = None
    run = assemble(settings, model, tokenizer, progress, ranks, device)
    run.tokenizer_settings = saved["tokenizer_settings"]
    for side, count in zip(("train", "val"), saved.get("corpus", ()), strict=False):
        if len(getattr(run, side)) != count:
            path = run.folder / "data" / f"{side}.tokens"
            raise InputError(f"{path}: damaged, the run began with {count:,} tokens")
    where = last / checkpoint.OPTIMIZER
    ranks.load_optimizer(run.model, run.optimizer, saved["optimizer"], where)
    if run.carried is not None:
        rows = ranks.own_rows(settings.batch_size)
        for layer, (conv, ssm) in zip(run.carried, saved["carried"], strict=True):
            layer.conv, layer.ssm = conv[rows].to(run.device), ssm[rows].to(run.device)
    return run


def own_config(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The configuration of a run's model, from that of its checkpoint and its settings.

    A checkpoint has neither the chunk size nor the factors of a factorised head.
    """
    if settings.output_size is not None and config.tied:
        raise InputError(
            f"{settings.folder / 'settings.json'}: not the settings of this run (output_size is "
            f"{settings.output_size}, but the checkpoint's head is its embedding)"
        )
    return replace(config, chunk_size=settings.chunk_size, output_size=settings.output_size)


def _workers(processes: int, threads: int | None = None) -> str:
    import torch

    of_each = amount(threads or torch.get_num_threads(), "thread")
    return of_each if processes == 1 else f"{processes} processes of {of_each}"


def _forget_samples_after(path: Path, size: int | None) -> None:
    """Cut off the samples after the last checkpoint. They will be written again."""
    if size is not None and path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _forget_metrics_after(path: Path, step: int) -> None:
    """Cut off the metrics after the last checkpoint. They will be written again."""
    if not path.exists():
        return
    kept = 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # incomplete, after a kill or on a full disk
            break
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not the metrics of a step") from error
        kept += len(line)
    os.truncate(path, kept)
