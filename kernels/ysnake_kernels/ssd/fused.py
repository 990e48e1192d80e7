"""The fused SSD scan as PyTorch sees it: two custom operators, so that torch.compile passes them by,
and the autograd between them. What is saved for backward is the inputs.
"""

import torch
from torch import Tensor

from ysnake_kernels.ssd.fused_forward import forward
from ysnake_kernels.ssd.fused_tiles import LARGEST


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `ssd_scan` has checked them; the tile is the kernel's own, not `chunk_size`.

    Raises:
        ValueError: a head or state is larger than the kernels hold.
    """
    for name, what, size in (("x", "head", x.shape[3]), ("B", "state", B.shape[3])):
        if size > LARGEST:
            raise ValueError(f"{name}: expected a {what} size of at most {LARGEST}, got {size}")
    small = (A, D, initial_states, dt_bias, seq_idx, cu_seqlens)
    A, D, initial_states, dt_bias, seq_idx, cu_seqlens = (
        None if t is None else t.contiguous() for t in small
    )
    options = (bool(dt_softplus), *map(float, dt_limit))
    return _scan(x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, *options)


@torch.library.custom_op("ysnake::ssd_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    return forward(
        x, dt, A, B, C, D, z, initial_states, dt_bias, seq_idx, cu_seqlens, softplus, low, high
    )
