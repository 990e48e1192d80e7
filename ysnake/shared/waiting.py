"""How the threads of a computation on a CPU wait for each other.

Torch's OpenMP threads wait in a busy loop before they sleep, by default for milliseconds. On a busy
machine the loop occupies the core that the awaited thread needs. So training and evaluation loop
only briefly. Generating token by token keeps the default: its operations are so short that sleeping
between them costs 7 percent on an idle machine.
"""

import os
import sys

# Any of these is the user's own choice. `ysnake_kernels.preemption` knows the same names.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = "2000"  # about 50 microseconds, longer than most waits on an idle machine
MILLISECONDS = "1"  # the shortest time above zero that every version understands


def sleep_soon() -> None:
    """Let waiting threads sleep soon, unless the user has chosen how they wait.

    The OpenMP library reads the environment once, when torch loads it. The library is GNU's on
    Linux (GOMP_SPINCOUNT), LLVM's on macOS and Intel's on Windows (KMP_BLOCKTIME). Does nothing
    once torch has been imported.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES):
        return
    os.environ["GOMP_SPINCOUNT"] = SPINS
    os.environ["KMP_BLOCKTIME"] = MILLISECONDS
