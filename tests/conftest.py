"""Settings of all tests.

Without a GPU, Triton kernels run in the interpreter. Random examples are the same in every run. The
longest files run first, so that parallel workers end at about the same time.
"""

import os
from importlib.util import find_spec

from ysnake.shared.waiting import sleep_soon

sleep_soon()  # before torch is imported, as training does

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from quick_interpreter import quicken_interpreter  # noqa: E402

LONGEST = (
    *("test_fused_ssd", "test_parallel", "test_launches", "test_faults", "test_train"),
    *("test_compile", "test_resume", "test_front_end", "test_fused_conv", "test_mixer"),
    *("test_decoding", "test_ssd", "test_memory", "test_families"),
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # else pytest-xdist sorts by number of tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


if not torch.cuda.is_available():  # before any test imports Triton, which then reads it
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
        quicken_interpreter()

settings.register_profile(
    "the same everywhere",
    derandomize=True,
    deadline=None,  # slowness of a busy machine is no error
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("the same everywhere")
