"""Notice that other programs take the cores from this process, and say once what helps.

Threads that wait for each other spin in a loop. On a busy machine that makes them several times
slower. How they wait is fixed when torch is imported, so only the user of a program can change it.
"""

import logging
import os
import sys
import time

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # if one is set, say nothing
WINDOW = 5.0  # seconds of processor time between two looks
# Losses of a core per second of processor time: 2 to 16 on an idle machine with two cores, 150 and
# more where a busy program takes one of them.
MOST = 60.0
ADVICE = (
    "other programs compete for the cores, and threads of this program waste time in busy loops "
    "while they wait for each other; set GOMP_SPINCOUNT=2000 and KMP_BLOCKTIME=1 in the "
    "environment before it starts: on a busy machine it then runs several times faster"
)


class Watch:
    """Counts how often the system takes a core from a thread of this process.

    Only Linux counts this. macOS counts threads that sleep too, and Windows counts nothing.
    """

    def __init__(self, window: float = WINDOW):
        self.window = window
        self.over = sys.platform != "linux" or any(name in os.environ for name in CHOICES)
        self.seconds, self.losses = self._used()

    def silence(self) -> None:
        """Do not warn from now on."""
        self.over = True

    def look(self) -> None:
        """Warn if threads lost their cores often since the last look. A Watch warns once."""
        if self.over or time.process_time() - self.seconds < self.window:
            return
        seconds, losses = self._used()
        if losses - self.losses > MOST * (seconds - self.seconds):
            self.over = True
            # A warning of Python's could stop a program that makes its warnings errors.
            logging.getLogger(__name__).warning("warning: %s", ADVICE)
        self.seconds, self.losses = seconds, losses

    def _used(self) -> tuple[float, int]:
        losses = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0
        return time.process_time(), losses


watch = Watch()
