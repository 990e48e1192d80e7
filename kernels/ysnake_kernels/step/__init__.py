"""One token of the SSD recurrence: arguments, checks, and the choice of implementation."""

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
from ysnake_kernels.native import state_step
from ysnake_kernels.padding import skip_padding
from ysnake_kernels.step import eager, reference
from ysnake_kernels.step.inputs import StepInputs


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

    For inference: it has no gradient. Inputs may be float64, float32, bfloat16 or float16. Computed
    in float32 (float64 if state or x is).

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
        state_batch_indices: (batch,) int32 or int64, the row of `state` that belongs to each x. No
            row may come twice, and the other rows stay as they are. An x whose row is -1 is
            padding, and its y is zero. For batches whose sequences come and go.

    Returns:
        y with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or values.

    Source: arXiv 2405.21060, equation 2 (the recurrent form).
    """
    inputs = StepInputs(
        *(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus, dt_limit)
    )
    check_step(inputs)
    return run(choose(x), inputs)


def run(name: str, inputs: StepInputs) -> Tensor:
    """y of checked inputs, by the implementation `name`. Compiled code may stand in for eager."""
    if name == "eager" and state_step.fits(inputs):
        return state_step.step(inputs)
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "fused":  # its kernel skips padding by itself
            from ysnake_kernels.step import fused  # here, since it needs triton

            return fused.step(inputs)
        step = reference.step if name == "reference" else eager.step
        if inputs.indices is None:
            return step(inputs)

        def of_rows(
            indices: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor | None
        ) -> Tensor:
            return step(inputs._replace(x=x, dt=dt, B=B, C=C, z=z, indices=indices))

        rows = inputs.x, inputs.dt, inputs.B, inputs.C, inputs.z
        return skip_padding(of_rows, inputs.state, inputs.indices, *rows)


def check_step(inputs: StepInputs) -> None:
    """Raise ValueError or TypeError where an argument of `ssd_step` is wrong."""
    state, x, B, z, indices = inputs.state, inputs.x, inputs.B, inputs.z, inputs.indices
    check_rank("x", x, "batch, heads, P")
    batch, heads, head_dim = x.shape
    check_rank("B", B, "batch, groups, N")
    groups, n = B.shape[1:]
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups dividing {heads} heads, got {groups}")
    of_state = batch
    if indices is not None:
        check_rank("state", state, "rows, heads, P, N")
        of_state = state.shape[0]
        check_indices("state_batch_indices", indices, x, of_state)
    check("state", state, (of_state, heads, head_dim, n), x)
    if not state.is_contiguous():
        raise ValueError("state: expected a contiguous tensor, got a strided one")
    check("dt", inputs.dt, (batch, heads), x)
    check("A", inputs.A, (heads,), x)
    check_decay(inputs.A)
    check("B", B, (batch, groups, n), x)
    check("C", inputs.C, (batch, groups, n), x, match="B")
    check_skip(inputs.D, heads, head_dim, x)
    if z is not None:
        check("z", z, tuple(x.shape), x)
    if inputs.dt_bias is not None:
        check("dt_bias", inputs.dt_bias, (heads,), x)
    check_limit(inputs.dt_limit)
