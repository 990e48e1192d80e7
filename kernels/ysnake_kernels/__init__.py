"""State-space-duality operators for PyTorch.

They are the Mamba-2 scan, its step for one token, the causal convolution and the gated norm around
them, the whole mixer, and the loss. Each has a `reference` that defines it, an `eager` path in pure
torch for any device, and a `fused` path in Triton for GPUs. Mamba-1's selective scan has the first
two.
"""

from ysnake_kernels.backend import backend
from ysnake_kernels.conv import causal_conv1d, causal_conv1d_step
from ysnake_kernels.loss import cross_entropy_
from ysnake_kernels.mixer import mamba_split_conv1d_scan_combined
from ysnake_kernels.norm import rms_norm_gated
from ysnake_kernels.selective_scan import selective_scan
from ysnake_kernels.ssd import ssd_scan
from ysnake_kernels.step import ssd_step

__all__ = [
    "backend",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_entropy_",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_gated",
    "selective_scan",
    "ssd_scan",
    "ssd_step",
]
