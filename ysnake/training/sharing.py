"""How the windows of a batch are shared out to the processes, and which settings forbid it."""

import os

from ysnake.model.config import ModelConfig
from ysnake.shared.errors import InputError
from ysnake.training.launch import TORCHRUN, launched
from ysnake.training.settings import Settings


def check(settings: Settings) -> None:
    """Raise InputError where these settings cannot be shared out to the processes there are."""
    size, context = int(os.environ.get("WORLD_SIZE", 1)), settings.context_parallel
    if not launched():
        if settings.shard or context > 1:
            option = "--shard" if settings.shard else "--context-parallel"
            raise InputError(f"{option}: needs several processes; start them with {TORCHRUN}")
        return
    if size % context:
        raise InputError(
            f"--context-parallel: expected a divisor of {size} processes, got {context}"
        )
    if settings.seq_len % context:
        raise InputError(
            f"--seq-len: {settings.seq_len} tokens cannot be split evenly over the {context} "
            "processes of --context-parallel"
        )
    if settings.seq_len // context < ModelConfig.conv_width - 1:
        raise InputError(
            f"--seq-len: {settings.seq_len // context} tokens for each of {context} processes are "
            "fewer than the convolution reaches back"
        )
    if settings.batch_size % (size // context):
        raise InputError(
            f"--batch-size: {settings.batch_size} sequences cannot be shared out evenly to "
            f"{size // context} {'groups of ' * (context > 1)}processes; it counts those of all"
        )
    if size > 1 and settings.memory is not None and not settings.resume:
        raise InputError(
            "--memory: plans for one process; with several give --batch-size, --accumulate and "
            "--recompute"
        )
    if context > 1 and settings.carry_state:
        raise InputError("--carry-state: hands states on in time, so not with --context-parallel")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"--device: expected auto, cpu or cuda with many processes, got {settings.device}"
        )


def share(settings: Settings) -> tuple[int, int]:
    """The windows of a batch that one process takes, and how many tokens of each."""
    size, context = int(os.environ.get("WORLD_SIZE", 1)), settings.context_parallel
    return -(-settings.batch_size // max(1, size // context)), settings.seq_len // context
