"""Dividing the windows of a batch among the processes, and checking that it is possible."""

from ysnake.model.config import ModelConfig
from ysnake.shared.errors import InputError
from ysnake.training.launch import TORCHRUN, launched, processes
from ysnake.training.options import Settings


def check(settings: Settings) -> None:
    """Raise InputError if the work of these settings cannot be divided among the processes."""
    size, context = processes(), settings.context_parallel
    if not launched():
        if settings.shard or context > 1:
            option = "--shard" if settings.shard else "--context-parallel"
            raise InputError(f"needs several processes; start them with {TORCHRUN}", field=option)
        return
    if size % context:
        raise InputError(
            f"expected a divisor of {size} processes, got {context}", field="--context-parallel"
        )
    if settings.seq_len % context:
        raise InputError(
            f"{settings.seq_len} tokens cannot be split evenly over the {context} "
            "processes of --context-parallel",
            field="--seq-len",
        )
    if settings.seq_len // context < ModelConfig.conv_width - 1:
        raise InputError(
            f"{settings.seq_len // context} tokens for each of {context} processes are fewer than "
            f"the {ModelConfig.conv_width - 1} earlier tokens that the convolution reads",
            field="--seq-len",
        )
    if settings.batch_size % (size // context):
        raise InputError(
            f"expected a multiple of the {size // context} "
            f"{'groups of ' * (context > 1)}processes, got {settings.batch_size}; it is the number "
            "of sequences of all processes together",
            field="--batch-size",
        )
    if size > 1 and settings.memory is not None and not settings.resume:
        raise InputError(
            "works with one process only; with several set --batch-size, --accumulate and "
            "--recompute",
            field="--memory",
        )
    if context > 1 and settings.carry_state:
        raise InputError(
            "cannot be combined with --context-parallel, which splits sequences",
            field="--carry-state",
        )
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"expected auto, cpu or cuda with many processes, got {settings.device}",
            field="--device",
        )


def share(settings: Settings) -> tuple[int, int]:
    """How many windows of a batch one process takes, and how many tokens of each."""
    size, context = processes(), settings.context_parallel
    return -(-settings.batch_size // max(1, size // context)), settings.seq_len // context
