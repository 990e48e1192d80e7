"""Why a training run ends, and the summary that is printed at its end."""

from ysnake.shared import cli
from ysnake.shared.errors import InputError, option
from ysnake.shared.shown import amount, as_argument
from ysnake.training.options import Settings
from ysnake.training.run import MEAN_OVER, Progress, Run, saved_step

GIVE_UP_AFTER = 10  # steps in a row without a finite loss
ENDINGS = {
    "steps": "step {step}, the last one, is done",
    "time": "the time is up",
    "loss": "the training loss is down to {loss:.3f}",
    "patience": "the held-out loss has stopped getting better",
    "interrupted": "interrupted",
    "diverged": f"loss or gradient was not finite {GIVE_UP_AFTER} times in a row, so the run was "
    "stopped; last/ holds the earlier checkpoint of step {kept}; resume with a lower --lr or a "
    "longer --warmup-steps",
}


def reason_to_end(run: Run) -> str | None:
    """The reason why the run should end now, if there is one."""
    settings, progress = run.settings, run.progress
    if progress.skipped_in_a_row >= GIVE_UP_AFTER:
        return "diverged"
    target = settings.stop_at_loss
    if target is not None and len(progress.recent) == MEAN_OVER and progress.mean_loss <= target:
        return "loss"
    if settings.max_steps is not None and progress.step >= settings.max_steps:
        return "steps"
    if settings.max_minutes is not None and progress.elapsed >= 60 * settings.max_minutes:
        return "time"
    if settings.patience is not None and progress.evaluations_since_best >= settings.patience:
        return "patience"
    return None


def replace_limits(settings: Settings, stored: Settings, progress: Progress) -> list[str]:
    """Lift a limit that a resumed run has reached, if the user gives another one.

    Args:
        settings: of the resumed run. A limit that is lifted becomes None.
        stored: what the run had before.
        progress: how far the run is.

    Returns:
        A line for the user about each limit that is lifted.

    Raises:
        InputError: the run has already reached a limit that the user gives.
    """
    done = {"max_steps": progress.step, "max_minutes": progress.elapsed / 60}
    limits = {name: getattr(settings, name) for name in done}
    reached = {name for name, limit in limits.items() if limit is not None and limit <= done[name]}
    new = {name for name, limit in limits.items() if limit not in (None, getattr(stored, name))}
    for name in sorted(reached & new):
        raise InputError(
            f"the run has trained {amount(progress.step, 'step')} and "
            f"{done['max_minutes']:.1f} minutes already, got {limits[name]:g}; a larger number "
            "trains it further",
            field=option(name),
        )
    lifted = sorted(reached) if new else []
    for name in lifted:
        setattr(settings, name, None)
    return [f"{option(name)} {limits[name]:g} was reached and no longer applies" for name in lifted]


def summary(run: Run, program: str = cli.MODULES) -> str:
    """The summary at the end of a run, in rich's markup: why it ended, and what to do next."""
    progress, folder = run.progress, cli.markup(as_argument(run.folder))
    assert progress.ended is not None
    kept = saved_step(run.folder / "last")
    why = ENDINGS[progress.ended].format(step=progress.step, loss=progress.mean_loss, kept=kept)
    lines = [
        f"[bold]{cli.markup(run.folder)}[/]: {why} ({progress.elapsed / 60:.1f} minutes of "
        f"training, {amount(progress.skipped, 'step')} skipped)",
        f"picture: {cli.markup(run.folder / 'loss.png')}",
        f'next: {cli.command_line("run", program)} {folder} --prompt "..."',
    ]
    resume = f"{cli.command_line('train', program)} --run {folder} --resume"
    if progress.ended == "interrupted":
        lines.append(f"continue: {resume}")
    elif further := _further(run):
        lines.append(f"train it further: {resume} {further}")
    if progress.ended == "time" and progress.step < run.settings.warmup_steps:
        lines.append(
            f"the learning rate did not reach its peak, since the warm-up takes "
            f"{amount(run.settings.warmup_steps, 'step')}; a lower --warmup-steps helps"
        )
    falling = progress.evaluations > 1 and progress.evaluations_since_best == 0
    if falling and progress.ended in ("steps", "time"):
        lines.append("the held-out loss was still falling, so more training may help")
    return "\n".join(lines)


def _further(run: Run) -> str | None:
    """The option with which a finished run can be trained further; None for an interrupted one."""
    settings, progress = run.settings, run.progress
    minutes = max(settings.max_minutes or 0, progress.elapsed / 60)  # an evaluation may take longer
    return {
        "steps": f"--max-steps {2 * progress.step}",
        "time": f"--max-minutes {2 * minutes:.3g}",
        "loss": f"--stop-at-loss {(settings.stop_at_loss or 0) / 2:g}",
        "patience": f"--patience {2 * (settings.patience or 0)}",
        "diverged": f"--lr {settings.lr / 3:.2g}",
    }.get(progress.ended or "")
