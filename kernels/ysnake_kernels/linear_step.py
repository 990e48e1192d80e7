"""Linear layers for decoding on a CPU: few rows, and weights from memory.

torch computes a product with one row on one core. Cut along its features, the product becomes a
batch with one product for each thread, and all threads read memory. With int8 weights a quarter of
the bytes is read.
"""

import warnings

import torch
from torch import Tensor, nn

from ysnake_kernels.linear import Linear

MAC_ENGINE = "qnnpack"  # torch has it on a Mac, but does not use it by default
FEW = 2  # rows up to which a product cut along its features is the faster one


class TransposedLinear(Linear):
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

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features); differentiable as `Linear`."""
        rows = x.shape[:-1].numel()
        if rows > FEW or torch.is_grad_enabled():
            return super().forward(x)
        y = torch.bmm(x.reshape(rows, self.cuts, -1).transpose(0, 1), self.parts).sum(0)
        if self.bias is not None:
            y += self.bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight, which also rounds its input, to 7 bits (8 on a Mac).

    Each row of the input has a scale of its own. So its output does not depend on other rows. No
    gradient flows through it. On a Mac it sets torch's engine for such layers, if none is set.
    """

    def __init__(self, linear: nn.Linear):
        """Raises NotImplementedError if this build of torch has no engine for such layers."""
        super().__init__()
        engines = torch.backends.quantized
        if engines.engine == "none" and MAC_ENGINE in engines.supported_engines:
            engines.engine = MAC_ENGINE
        if engines.engine == "none":
            raise NotImplementedError("this build of torch has no engine for int8 products")
        # the other engines add pairs of products in 16 bits, where sums could overflow
        self.reduce_range = engines.engine != MAC_ENGINE
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch will remove such tensors, one reason to pin it
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), both float32."""
        rows = x.reshape(-1, x.shape[-1])
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        # The product rounds all rows to one range. With this row it is always from -1 to 1.
        limits = torch.zeros_like(rows[:1])
        limits[:, 0], limits[:, -1] = -1, 1
        inputs = torch.cat([rows / largest, limits])
        y = torch.ops.quantized.linear_dynamic(inputs, self.packed, self.reduce_range)[:-1]
        y = y.mul_(largest).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)
