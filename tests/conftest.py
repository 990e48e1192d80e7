"""No GPU: Triton kernels run in the interpreter. Examples that are drawn are always the same."""

import os

from ysnake.shared.waiting import sleep_soon

sleep_soon()  # before torch is imported, as training does

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if not torch.cuda.is_available():  # Triton reads it when it is imported: before any test imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "the same everywhere",
    derandomize=True,
    deadline=None,  # a busy machine is no error
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("the same everywhere")
