"""One token of the SSD recurrence: arguments, checks, and the choice of implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.checks import (
    check,
    check_decay,
    check_indices,
    check_limit,
    check_rank,
    check_skip,
)
from ysnake_kernels.padding import skip_padding
from ysnake_kernels.step import eager, reference


def _implementation(name: str) -> Callable[..., Tensor]:
    if name == "fused":
        from ysnake_kernels.step import fused  # here, since it needs triton

        return fused.step
    return {"reference": reference.step, "eager": eager.step}[name]


@torch.no_grad()
def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """Advance the recurrence of `ssd_scan` by one token; `state` is updated in place.

    Inference only: no gradient flows. Dtypes as in `ssd_scan`.

    Args:
        state: (batch, heads, P, N), contiguous; best in float32, whatever x is. With
            `state_batch_indices` (rows, heads, P, N), any number of rows.
        x: (batch, heads, P).
        dt: (batch, heads).
        A: (heads,), at most 0.
        B, C: (batch, groups, N); groups divides heads.
        D: (heads,) or (heads, P).
        z: shape of x.
        dt_bias: (heads,).
        dt_softplus, dt_limit: as in `ssd_scan`.
        state_batch_indices: (batch,) int32 or int64, the row of `state` that belongs to each x, no
            row twice; the other rows stay as they are. An x whose row is -1 is padding: its y is
            zero. For batching in which sequences come and go.

    Returns:
        y with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, equation 2 (the recurrent form).
    """
    check_rank("x", x, "batch, heads, P")
    batch, heads, head_dim = x.shape
    check_rank("B", B, "batch, groups, N")
    groups, n = B.shape[1:]
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups dividing {heads} heads, got {groups}")
    of_state = batch
    if state_batch_indices is not None:
        check_rank("state", state, "rows, heads, P, N")
        of_state = state.shape[0]
        check_indices("state_batch_indices", state_batch_indices, x, of_state)
    check("state", state, (of_state, heads, head_dim, n), x)
    if not state.is_contiguous():
        raise ValueError("state: expected a contiguous tensor, got a strided one")
    check("dt", dt, (batch, heads), x)
    check("A", A, (heads,), x)
    check_decay(A)
    check("B", B, (batch, groups, n), x)
    check("C", C, (batch, groups, n), x, match="B")
    check_skip(D, heads, head_dim, x)
    if z is not None:
        check("z", z, tuple(x.shape), x)
    if dt_bias is not None:
        check("dt_bias", dt_bias, (heads,), x)
    check_limit(dt_limit)
    name = choose(x)
    step = _implementation(name)

    def run(
        indices: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None
    ) -> Tensor:
        return step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, indices)

    rows = x, dt, B, C, z
    with torch.autocast(x.device.type, enabled=False):
        if name == "fused":  # its kernel skips padding by itself
            return run(state_batch_indices, *rows)
        return skip_padding(run, state_batch_indices, *rows)
