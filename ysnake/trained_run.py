"""Training from Python: `ysnake.train(data=["my_book.txt"])`, and the run that it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ysnake.shared import run_files

if TYPE_CHECKING:
    from ysnake.inference.model_options import Weights
    from ysnake.language_model import LanguageModel


@dataclass(frozen=True)
class TrainedRun:
    """A run on disk. `ysnake.train` returns one."""

    path: Path
    """The folder of the run."""
    ended: str
    """Why training ended: steps, time, loss, patience, interrupted or diverged."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each step."""
        return run_files.metrics(self.path)

    @property
    def losses(self) -> dict[int, float]:
        """The training loss after each step, in nats per token."""
        return self._of_steps("train_loss")

    @property
    def held_out_losses(self) -> dict[int, float]:
        """The held-out loss after each step with an evaluation, in nats per token."""
        return self._of_steps("val_loss")

    def load(
        self,
        checkpoint: Literal["best", "last"] | None = None,
        *,
        device: str = "auto",
        weights: "Weights" = "float32",
    ) -> "LanguageModel":
        """Load the model of the run. The arguments are those of `ysnake.load`."""
        from ysnake.language_model import load

        return load(self.path, checkpoint=checkpoint, device=device, weights=weights)

    def _of_steps(self, name: str) -> dict[int, float]:
        return {m["step"]: m[name] for m in self.metrics if m.get(name) is not None}


def train(
    data: Path | str | Sequence[Path | str] | None = None,
    *,
    preset: str | None = None,
    run: Path | str | None = None,
    resume: bool = False,
    config: Path | str | None = None,
    quiet: bool = False,
    **settings: str | float | bool | Path | None,
) -> TrainedRun:
    """Train a model, or continue a run. It prints what `ysnake train` prints.

    Ctrl-C, or a notebook's stop button, saves the run and returns it; `resume` continues it.

    Args:
        data: files and folders to train on. None is the shipped corpus.
        preset: quick, ys-24m, ys-60m or ys-71m. None is quick, or what `config` or `size` says.
        run: the folder of the run. None is a new one in runs/, or the newest one with `resume`.
        resume: continue the run with its own settings.
        config: a file with settings, TOML or the settings.json of a run. Arguments win over it.
        quiet: print nothing.
        settings: the other options of `ysnake train`, such as size, max_steps, seq_len or from_.

    Raises:
        InputError: a setting is unknown or wrong, or the data cannot be used.
    """
    from ysnake.shared import cli
    from ysnake.shared.errors import InputError, named_as_in_python
    from ysnake.shared.waiting import sleep_soon
    from ysnake.training import session, sharing
    from ysnake.training import settings as settings_of

    named = {"data": data, "preset": preset, "run": run, "config": config}
    given = {name: value for name, value in named.items() if value is not None} | settings
    names = [field.name for field in fields(settings_of.Settings)]
    sleep_soon()
    say: settings_of.Say = (lambda _: None) if quiet else print
    with cli.usual_torch():
        with named_as_in_python(names):
            chosen = settings_of.from_values(given | {"resume": resume}, say)
        if chosen.plan:
            raise InputError("expected the command line: ysnake train --plan", field="plan")
        console = cli.console()
        console.quiet = quiet
        with named_as_in_python(names):
            sharing.check(chosen)
            cli.use_threads(chosen.threads)
            progress = session.train(chosen, console)
    return TrainedRun(chosen.folder, progress.ended or "")
