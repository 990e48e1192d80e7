"""A kernel as the `kernels` package loads it; ysnake_kernels has to be installed."""

from ysnake_kernels.dropin import hub_layers as layers

__all__ = ["layers"]
