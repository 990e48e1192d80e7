"""Limits that Linux sets to this process by control groups, as containers and Slurm do.

A process belongs to one group, which lies inside others. The limits of all of them hold. Version 1
of control groups has a tree of groups for each resource, version 2 has one tree for all.
"""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")  # which groups this process belongs to
MEMORY, CPU = "memory", "cpu"  # names of resources


def memory_limit() -> int | None:
    """The bytes of memory that the process may use; None if no group limits them."""
    limits = []
    for group in _groups(MEMORY):
        limits += _numbers(group / "memory.max") + _numbers(group / "memory.limit_in_bytes")
    return min(limits, default=None)


def cpu_limit() -> float | None:
    """The number of CPU cores whose time the process may use; None if no group limits it."""
    limits = []
    for group in _groups(CPU):
        limits.append(_numbers(group / "cpu.max"))  # microseconds of time, in such a period
        limits.append(_numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us"))
    found = (limit for limit in limits if len(limit) == 2)
    return min((time / period for time, period in found if time > 0 and period > 0), default=None)


def _groups(resource: str) -> Iterator[Path]:
    """The folders of the groups that limit this process.

    In a container the path in OWN can be that of the machine outside. The container's own group is
    then the root.
    """
    try:
        lines = OWN.read_text().splitlines()
    except (OSError, ValueError):  # not Linux, or it cannot be read
        return
    for line in lines:
        number, resources, path = line.split(":", 2)
        if number == "0":
            root = ROOT
        elif resource in resources.split(","):
            root = ROOT / resource
        else:
            continue
        group = root / path.lstrip("/")
        while group != root and root in group.parents:
            yield group
            group = group.parent
        yield root


def _numbers(path: Path) -> list[int]:
    """The numbers in a file; no numbers if it is missing, or says that there is no limit."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
