"""One recurrent step of the SSD layer in Triton: one kernel that reads and writes the state once.

A program owns some rows of one head's state. All its other inputs are small beside the state.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ysnake_kernels.custom_op import InPlace
from ysnake_kernels.numerics import ceil_divide, next_power_of_2
from ysnake_kernels.step.inputs import StepInputs
from ysnake_kernels.triton_launch import contiguous, launcher, triton_accumulator
from ysnake_kernels.triton_math import clamp, finite, softplus

TILE = 2048  # elements of the state per program: 8 KB in float32, small enough for batch 1
MAX_STATE = 4096  # N, a row of the tile


def step(inputs: StepInputs) -> Tensor:
    """y of `ssd_step`, for inputs that it has checked; their state is updated in place.

    Raises:
        ValueError: the state size N is too large.
    """
    n = inputs.B.shape[-1]
    if n > MAX_STATE:
        raise ValueError(
            f"B: expected a state size of at most {MAX_STATE} with backend 'fused', got {n}"
        )
    *arguments, dt_limit = inputs
    return _in_place(*arguments, *map(float, dt_limit))


@triton.jit
def _step_kernel(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    indices,
    y,
    heads,
    x_batch,
    x_head,
    dt_batch,
    dt_head,
    B_batch,
    B_group,
    C_batch,
    C_group,
    z_batch,
    z_head,
    HEADS_PER_GROUP: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = head // HEADS_PER_GROUP
    p = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLS)

    step = tl.load(dt + batch * dt_batch + head * dt_head).to(ACC)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(ACC)
    if SOFTPLUS:
        step = softplus(step)
    step = clamp(step, LOW, HIGH)
    decay = tl.exp(step * finite(tl.load(A + head).to(ACC)))

    xs = tl.load(x + batch * x_batch + head * x_head + p, p < P, other=0.0).to(ACC)  # [P]
    Bs = tl.load(B + batch * B_batch + group * B_group + n, n < N, other=0.0).to(ACC)  # [N]
    Cs = tl.load(C + batch * C_batch + group * C_group + n, n < N, other=0.0).to(ACC)
    row = batch if indices is None else tl.load(indices + batch).to(tl.int64)
    at = state + (row * heads + head) * (P * N) + p[:, None] * N + n[None, :]
    used = row + p * 0 >= 0  # -1 is padding
    inside = (used & (p < P))[:, None] & (n < N)[None, :]
    S = tl.load(at, inside, other=0.0).to(ACC) * decay  # [P N]
    S += (step * xs)[:, None] * Bs[None, :]
    tl.store(at, S.to(state.dtype.element_ty), inside)

    out = tl.sum(S * Cs[None, :], 1)
    if D is not None:
        if D_PER_CHANNEL:
            out += xs * tl.load(D + head * P + p, p < P, other=0.0).to(ACC)
        else:
            out += xs * tl.load(D + head).to(ACC)
    if z is not None:
        zs = tl.load(z + batch * z_batch + head * z_head + p, p < P, other=0.0).to(ACC)
        out *= zs * tl.sigmoid(zs)
    out = tl.where(used, out, 0.0)
    tl.store(y + (batch * heads + head) * P + p, out.to(y.dtype.element_ty), p < P)


def configuration(head_dim: int, n: int) -> dict[str, int]:
    """Rows and columns of the state's tile, and warps, on any architecture."""
    cols = next_power_of_2(n)
    rows = min(next_power_of_2(head_dim), max(1, TILE // cols))
    return {"ROWS": rows, "COLS": cols, "num_warps": 4}


def _adjacent(t: Tensor) -> Tensor:
    """t with the elements of its last dimension side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _launch(inputs: StepInputs) -> Tensor:
    state, x, dt, z, D = inputs.state, inputs.x, inputs.dt, inputs.z, inputs.D
    batch, heads, head_dim = x.shape
    groups, n = inputs.B.shape[1:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, B, C = _adjacent(x), _adjacent(inputs.B), _adjacent(inputs.C)
    z = None if z is None else _adjacent(z)
    A, D, dt_bias = inputs.A.contiguous(), contiguous(D), contiguous(inputs.dt_bias)
    indices = contiguous(inputs.indices)
    rows, cols, warps = configuration(head_dim, n).values()
    acc = triton_accumulator(state, x)
    per_channel = D is not None and D.ndim == 2
    sizes = heads // groups, head_dim, n
    dt_options = inputs.dt_softplus, *inputs.dt_limit
    with torch.cuda.device_of(x):
        launcher(_step_kernel, (*sizes, per_channel, *dt_options, rows, cols, acc), warps)(
            (batch, heads, ceil_divide(head_dim, rows)),
            (state, x, dt, A, B, C, D, z, dt_bias, indices, y),
            (heads, *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2])
            + ((0, 0) if z is None else z.stride()[:2]),
        )
    return y


def _step(*arguments: Any) -> Tensor:
    """y of `ssd_step`. The arguments are the fields of StepInputs, with dt_limit as two numbers."""
    *fields, low, high = arguments
    return _launch(StepInputs._make((*fields, (low, high))))


_operator = torch.library.custom_op(
    "ysnake::step",
    _step,
    mutates_args=("state",),
    schema="(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? indices, bool dt_softplus, float low, float high)"
    " -> Tensor",
)


@_operator.register_fake
def _(state, x, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_in_place = InPlace(_operator, _step, written=0)
