"""Where there is no GPU, Triton kernels run in the interpreter."""

import os

import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported: before any test imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
