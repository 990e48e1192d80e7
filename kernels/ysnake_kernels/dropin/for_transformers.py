"""Functions for models of transformers, which then compute the same as without the drop-in.

A model passes tensors to a function, not modules. So a function that replaces several modules
cannot see their adapters, hooks, masks and other settings. By default models get no such function.
They run their own modules, and our operators in them.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache, wraps
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ysnake_kernels.backend import choose
from ysnake_kernels.dropin import functions

MIN_WIDTH, MAX_FUSED_WIDTH = 2, 4  # of convolutions; the Triton kernels take at most 4
SCANS_OF_OTHERS = ("gated_delta_rule", "delta_attention")  # parts of the names of scans not ours


class Models:
    """Which functions the models get, and which they asked for.

    Args:
        fused: give them one function for a whole mixer in training; see `install`.
    """

    def __init__(self, fused: bool):
        self.fused = fused
        self.asked: dict[str, set[str]] = {}

    def offer(self, name: str) -> Callable | None:
        """The function for the model that is being imported; None if it gets the plain one."""
        model = _model_being_imported()
        if model is None:
            return None
        asked = self.asked.setdefault(model, set())
        asked.add(name)
        if name == "causal_conv1d_fn":
            return _convolution_for(model, asked)
        if name == "causal_conv1d_update":
            return causal_conv1d_update
        if name == "mamba_split_conv1d_scan_combined":
            return mamba_split_conv1d_scan_combined if self.fused else own_modules
        if name == "mamba_inner_fn":  # Mamba-1's whole mixer
            return own_modules
        return None


def _model_being_imported() -> str | None:
    """The module of transformers.models that is being imported and asks; None if another asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("transformers.models.") and frame.f_code.co_name == "<module>":
            return name
        if not name.startswith(("transformers.", "importlib.", "ysnake_kernels.dropin")):
            return None
        frame = frame.f_back
    return None


def _convolution_for(model: str, asked: set[str]) -> Callable:
    """`convolve` for a model. It refuses `seq_idx` if the model's scan does not know of documents.

    In such a scan the documents would see each other. transformers itself refuses it too.
    """

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        activation: str | None = None,
        cu_seq_lens_q: Tensor | None = None,
    ) -> Tensor:
        if seq_idx is not None and _scan_mixes_documents(model, asked, cu_seq_lens_q):
            raise ValueError(
                f"seq_idx: the scan of {model} does not know of packed documents and would mix "
                "them; give it one document in a row"
            )
        return convolve(x, weight, bias, seq_idx, activation)

    return causal_conv1d_fn


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> Tensor:
    """`functions.causal_conv1d_fn` with every activation and width that a model can have."""
    if _torch_is_faster(x, seq_idx):
        theirs = activation
        y = _torch_convolution(x, weight, bias, weight.shape[1] - 1)[..., : x.shape[2]]
    elif _has_operator(x, weight):
        ours, theirs = _split_activation(activation)
        out = functions.causal_conv1d_fn(x, weight, bias, seq_idx, activation=ours)
        assert isinstance(out, Tensor)
        y = out
    elif seq_idx is not None:
        width = weight.shape[1]
        raise ValueError(
            f"seq_idx: packed documents are not supported with a convolution of width {width} here"
        )
    else:
        theirs = activation
        y = _torch_convolution(x, weight, bias, weight.shape[1] - 1)[..., : x.shape[2]]
    return _activate(y, theirs).to(x.dtype)


def _scan_mixes_documents(model: str, asked: set[str], cu_seq_lens_q: Tensor | None) -> bool:
    """Whether a model passes the numbers of documents to its convolution, but not to its scan."""
    if "selective_scan_fn" in asked:  # Mamba-1
        return True
    of_others = any(scan in name for scan in SCANS_OF_OTHERS for name in vars(sys.modules[model]))
    return of_others and cu_seq_lens_q is None


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`functions.causal_conv1d_update` with every activation and width that a model can have."""
    if _has_operator(x, weight):
        ours, theirs = _split_activation(activation)
        y = functions.causal_conv1d_update(x, conv_state, weight, bias, ours)
    else:
        theirs = activation
        tokens = torch.cat([conv_state, x], dim=-1)
        conv_state.copy_(tokens[..., -conv_state.shape[-1] :])
        y = _torch_convolution(tokens, weight, bias, 0)[..., -x.shape[2] :]
    return _activate(y, theirs).to(x.dtype)


def own_modules(*arguments: Any, **options: Any) -> None:
    """Returns None. transformers then runs the model's own modules, with our operators in them."""


@wraps(functions.mamba_split_conv1d_scan_combined)
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, *arguments: Any, **options: Any
) -> Tensor | tuple[Tensor, Tensor] | None:
    _, theirs = _split_activation(options["activation"])
    if theirs is None and _has_operator(zxbcdt, conv1d_weight):
        call = functions.mamba_split_conv1d_scan_combined
        return call(zxbcdt, conv1d_weight, *arguments, **options)
    _say_once(f"the fused mixer does not know the activation {options['activation']!r}")
    return None


def _split_activation(activation: str | None) -> tuple[str | None, str | None]:
    """The activation that our convolution applies, and the one that is left to torch."""
    return (activation, None) if activation in (None, "silu", "swish") else (None, activation)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    from transformers.activations import ACT2FN  # its models ask for these

    return ACT2FN[activation](y)


def _has_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether our convolution takes this width on this device. If not, a warning says so once."""
    width = weight.shape[1]
    if width >= MIN_WIDTH and (width <= MAX_FUSED_WIDTH or choose(x) != "fused"):
        return True
    _say_once(f"torch does a convolution of width {width}, which our operators do not")
    return False


def _torch_is_faster(x: Tensor, seq_idx: Tensor | None) -> bool:
    """Whether to leave a convolution to torch: float32 on a CPU, with the tokens of a channel side
    by side in memory. Ours is for channels side by side."""
    channel_first = x.shape[2] > 1 and x.stride(2) == 1 != x.stride(1)
    return channel_first and seq_idx is None and x.dtype == torch.float32 and choose(x) == "eager"


def _torch_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    taps = weight[:, None]
    return F.conv1d(x.to(weight.dtype), taps, bias, padding=padding, groups=len(weight))


def _say_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


@cache
def _warn(message: str) -> None:
    warnings.warn(f"ysnake_kernels.dropin: {message}", stacklevel=2)
