"""A weight matrix in one of the formats that the compiled code multiplies.

Packed formats are laid out in the order in which a product reads them: blocks of 4 rows by 32
columns, one row of a block after the other. Missing rows and columns are zeros.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ysnake_kernels.linear import Linear
from ysnake_kernels.native.build import library

FORMATS = ("float32", "bfloat16", "int8", "int4")  # in the order of products.hpp
GROUP = 32  # columns of a block, which share a scale in int4
ROWS = 4  # rows of a block
FEW = 128  # rows of x up to which the compiled product is the faster one
SCALES_TRIED = 6  # for each group of int4
LARGEST = 2047  # of the integers to which x is rounded, as in products.hpp
MOST_OF_A_SUM = 2**31 - 1  # sums of their products have 32 bits
AT_A_TIME = 1 << 15  # weights for which they are tried, so that all stays in the cache


class MatrixStruct(ctypes.Structure):
    """`Matrix` in products.hpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("format", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "bias")),
    ]


class Matrix:
    """A weight matrix with its bias, as the compiled code reads it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, format: str):
        """Pack a weight.

        Args:
            weight: (rows, columns), floating point. The format float32 uses its memory if it is in
                float32, contiguous and on the CPU. Other formats copy.
            bias: (rows,), floating point, or None.
            format: float32; bfloat16; int8, with a scale for each row; or int4, with a scale for
                each 32 columns of a row. With integer weights each row of x is rounded in a
                product: to integers from -2,047 to 2,047 (fewer beyond 8,192 columns) times a
                scale.

        Raises:
            ValueError: the format is unknown, or the bias has another length.
            BuildError: the code cannot be compiled here.
        """
        if format not in FORMATS:
            raise ValueError(f"format: expected {', '.join(FORMATS)}, got {format!r}")
        self.format, (self.rows, self.columns) = format, weight.shape
        if bias is not None and bias.shape != weight.shape[:1]:
            expected, got = tuple(weight.shape[:1]), tuple(bias.shape)
            raise ValueError(f"bias: expected shape {expected} to match weight, got {got}")
        self.scales: Tensor | None = None
        weight = as_floats(weight)
        if format == "float32":
            self.weights = weight
        else:
            groups = _in_groups(weight)
            if format == "bfloat16":
                self.weights = _interleaved(groups.bfloat16())
            elif format == "int8":
                self.scales = groups.abs().amax((1, 2)).div_(127)
                unit = self.scales.clamp(min=1e-30)[:, None, None]
                self.weights = _interleaved(torch.round(groups / unit).to(torch.int8))
            else:
                scales = _int4_scales(groups)
                low, high = _int4(groups, scales).add_(8).to(torch.uint8).chunk(2, -1)
                self.weights = _interleaved(low | (high << 4))
                self.scales = _interleaved(scales)
        self.bias = None if bias is None else as_floats(bias)
        self.code = library()
        self.struct = MatrixStruct(
            *(FORMATS.index(format), self.rows, self.columns, self.weights.data_ptr()),
            *(None if t is None else t.data_ptr() for t in (self.scales, self.bias)),
        )

    def product(self, x: Tensor) -> Tensor:
        """x weight^T + bias for few rows: x (..., columns) -> (..., rows), float32.

        Raises:
            ValueError: x has another number of columns.
        """
        if x.shape[-1] != self.columns:
            raise ValueError(f"x: expected {self.columns} columns, got {x.shape[-1]}")
        x = as_floats(x)
        y = x.new_empty(*x.shape[:-1], self.rows)
        batch, threads = x.shape[:-1].numel(), torch.get_num_threads()
        sizes = map(ctypes.c_int64, (batch, threads))
        x_at, y_at = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        self.code.ysnake_product(ctypes.byref(self.struct), x_at, *sizes, y_at)
        return y

    def rounded(self, x: Tensor) -> Tensor:
        """x (..., columns) as `product` rounds it: where weights are integers, to integers too."""
        if self.format not in ("int8", "int4"):
            return x
        padded = -(-self.columns // GROUP) * GROUP
        most = min(LARGEST, MOST_OF_A_SUM // 128 // padded)
        largest = x.abs().amax(-1, keepdim=True)
        integers = torch.round(x * (most / largest.clamp(min=1e-30)))
        return integers.mul_(largest / most)

    def dense(self) -> Tensor:
        """The weight as float32 (rows, columns), with the rounding of its format."""
        if self.format == "float32":
            return self.weights
        y = self.weights.new_empty(self.rows, self.columns, dtype=torch.float32)
        threads, at = ctypes.c_int64(torch.get_num_threads()), ctypes.c_void_p(y.data_ptr())
        self.code.ysnake_unpack(ctypes.byref(self.struct), threads, at)
        return y


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. No gradient flows through it."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows), both float32."""
        if x.shape[:-1].numel() <= FEW:
            return self.matrix.product(x)
        return F.linear(self.matrix.rounded(x), self.matrix.dense(), self.matrix.bias)


class Float32Linear(Linear):
    """A linear layer with a float32 weight, which compiled code multiplies with few rows."""

    def __init__(self, linear: nn.Linear, matrix: Matrix):
        """Uses the weight and bias of `linear`, whose float32 matrix is `matrix`."""
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        super().__init__(*sizes, device="meta")
        self.weight, self.bias, self.matrix = linear.weight, linear.bias, matrix

    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows); differentiable as `Linear`."""
        if x.shape[:-1].numel() <= FEW and not torch.is_grad_enabled():
            return self.matrix.product(x)
        return super().forward(x)


def as_floats(t: Tensor) -> Tensor:
    """The tensor as the compiled code reads it: float32 on the CPU, its elements side by side."""
    return t.detach().to("cpu", torch.float32).contiguous()


def _in_groups(weight: Tensor) -> Tensor:
    """(rows, columns) -> (rows, groups, 32), filled up with zeros."""
    rows, columns = weight.shape
    return F.pad(weight, (0, -columns % GROUP, 0, -rows % ROWS)).unflatten(1, (-1, GROUP))


def _interleaved(t: Tensor) -> Tensor:
    """(rows, groups, ...) -> (rows / 4, groups, 4, ...), contiguous."""
    return t.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def _int4_scales(groups: Tensor) -> Tensor:
    """The scale of each group (rows, groups): of those tried, the one with the least error."""
    rows = max(1, AT_A_TIME // groups[0].numel())
    return torch.cat([_best_scales(part) for part in groups.split(rows)])


def _best_scales(groups: Tensor) -> Tensor:
    largest = groups.abs().amax(-1)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for i in range(SCALES_TRIED):
        scales = largest / (5 + 4 * i / SCALES_TRIED)
        error = (_int4(groups, scales) * scales[..., None] - groups).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _int4(groups: Tensor, scales: Tensor) -> Tensor:
    """The integers from -8 to 7 of each group, for its scale."""
    return torch.round(groups / scales[..., None].clamp(min=1e-30)).clamp_(-8, 7)
