"""Linear layers for writing token by token on a CPU: few rows, and weights from memory.

torch computes a product with one row on one core. Cut along its features, the product becomes a
batch with one product for each thread, and all threads read memory. With int8 weights a quarter of
the bytes is read.
"""

import warnings

import torch
from torch import Tensor, nn

from ysnake_kernels.linear import Linear, linear

FEW = 2  # rows up to which a product cut along its features is the faster one
# A compiled graph passes tensors only, and torch's packed weights are no tensor. So the tensor of
# an int8 layer's scales, which the graph passes, carries them as an attribute of this name.
PACKED = "packed_weight"

# torch.compile calls these operators. The loops that it would generate instead are slower.
_library = torch.library.Library("ysnake", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear", linear, "CPU")
_library.define("linear_int8(Tensor x, Tensor scales) -> Tensor")


@torch.library.register_fake("ysnake::linear", lib=_library)
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.register_fake("ysnake::linear_int8", lib=_library)
def _(x, scales):
    return x.new_empty(*x.shape[:-1], len(scales))


class OneRow(Linear):
    """A linear layer whose weight is stored transposed, which is faster for one or two rows."""

    def __init__(self, linear: nn.Linear):
        """Uses the weight and bias of `linear`. The weight's memory layout changes in place."""
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        super().__init__(*sizes, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.data = self.weight.detach().t().contiguous().t()
        threads = torch.get_num_threads()
        self.cuts = 1 if self.in_features % threads else threads
        self.parts = self.weight.detach().t().view(self.cuts, -1, self.out_features)
        self.nothing = self.weight.new_zeros(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features); differentiable as `Linear`."""
        rows, compiling = x.shape[:-1].numel(), torch.compiler.is_compiling()
        if torch.is_grad_enabled():
            return super().forward(x)
        if rows > FEW:
            if compiling:
                return torch.ops.ysnake.linear(x, self.weight, self.bias)
            return super().forward(x)
        cut = x.reshape(rows, self.cuts, -1).transpose(0, 1)
        if compiling:  # torch.compile calls baddbmm, but generates slow loops for bmm
            y = torch.baddbmm(self.nothing, cut, self.parts, beta=0).sum(0)
        else:
            y = torch.bmm(cut, self.parts).sum(0)
        if self.bias is not None:
            y += self.bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


class Int8(nn.Module):
    """A linear layer with an int8 weight. Each input row is scaled by its largest entry.

    No gradient flows through it.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch will remove such tensors, one reason to pin it
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach()
        self.scales = scales
        setattr(scales, PACKED, _Packed(quantised, bias))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), both float32."""
        if torch.compiler.is_compiling():
            return torch.ops.ysnake.linear_int8(x, self.scales)
        return _linear_int8(x, self.scales)


class _Packed:
    """An int8 weight in the layout of torch's int8 product."""

    def __init__(self, quantised: Tensor, bias: Tensor | None):
        self.weight = torch.ops.quantized.linear_prepack(quantised, bias)
        self.has_bias = bias is not None


def _linear_int8(x: Tensor, scales: Tensor) -> Tensor:
    """The product with the weight that the tensor of scales carries."""
    packed: _Packed = getattr(scales, PACKED)
    # The product uses one scale for all rows of x. With reduce_range no sum overflows.
    if packed.has_bias or x.shape[:-1].numel() == 1:
        return torch.ops.quantized.linear_dynamic(x, packed.weight, True)
    largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
    return torch.ops.quantized.linear_dynamic(x / largest, packed.weight, True).mul_(largest)


_library.impl("linear_int8", _linear_int8, "CPU")
