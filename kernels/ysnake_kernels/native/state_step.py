"""One token of the recurrence by the compiled code, which reads and writes the state once."""

import ctypes

import torch
from torch import Tensor, nn

from ysnake_kernels.native import build
from ysnake_kernels.step.inputs import StepInputs

Pointer = ctypes.c_void_p
PLAIN = (Tensor, nn.Parameter)


class RecurrenceStruct(ctypes.Structure):
    """`Recurrence` in kernels.cpp."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "heads", "groups", "head_dim", "state")),
        *((name, ctypes.c_int64) for name in ("softplus", "D_per_channel")),
        *((name, ctypes.c_double) for name in ("dt_low", "dt_high")),
        *((name, Pointer) for name in ("S", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
    ]


def fits(inputs: StepInputs) -> bool:
    """Whether `step` can take the inputs, which `ssd_step` has checked, here and now.

    It can if the code is compiled already, and if all tensors are plain ones on a CPU that nothing
    traces or transforms. Others are for pure torch.
    """
    if torch.compiler.is_compiling():  # first, since the compiler cannot trace what follows
        return False
    state, x = inputs.state, inputs.x
    return (
        state.dtype == torch.float32
        and x.dtype != torch.float64
        and x.device.type == "cpu"
        and inputs.indices is None
        and all(t is None or type(t) in PLAIN for t in inputs[:-2])
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.jit.is_tracing()
        and build.ready()
    )


def _array(tensor: Tensor) -> Tensor:
    """The tensor in float32, its elements side by side."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor  # the checks take less time than conversions that do nothing
    return tensor.to(torch.float32).contiguous()


def step(inputs: StepInputs) -> Tensor:
    """y of `ssd_step`, for inputs that fit; their state is updated in place."""
    state, x, D = inputs.state, inputs.x, inputs.D
    batch, heads, head_dim, n = state.shape
    given = (x, inputs.dt, inputs.A, inputs.B, inputs.C, D, inputs.z, inputs.dt_bias)
    arrays = [None if t is None else _array(t) for t in given]
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    struct = RecurrenceStruct(
        *(batch, heads, inputs.B.shape[1], head_dim, n),
        *(bool(inputs.dt_softplus), D is not None and D.ndim == 2, *inputs.dt_limit),
        *(None if t is None else t.data_ptr() for t in (state, *arrays)),
    )
    threads = build.threads_for(state.numel())
    build.library().ysnake_state_step(
        ctypes.byref(struct), ctypes.c_int64(threads), Pointer(y.data_ptr())
    )
    torch.autograd.graph.increment_version(state)
    return y.to(x.dtype)
