"""The limits of control groups, in folders laid out as Linux has them."""

import os
import subprocess
import sys

import pytest
import torch

from ysnake.shared import cli, control_groups

CASES = {
    "version 2, the group inside limits less": (
        "0::/job/step",
        {"memory.max": "max", "job/memory.max": "8000", "job/step/memory.max": "9000"},
        {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"},
        (8000, 1.5),
    ),
    "version 2, a container that is its own root": (
        "0::/",
        {"memory.max": "7000"},
        {"cpu.max": "400000 100000"},
        (7000, 4.0),
    ),
    "version 1, a path of the machine outside": (
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
        {"memory/memory.limit_in_bytes": "6000"},
        {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
        (6000, 2.0),
    ),
    "version 1, nothing is limited": (
        "5:cpu:/\n4:memory:/",
        {},
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        (None, None),
    ),
    "no control groups": ("", {}, {}, (None, None)),
}


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write the list of this process's groups and the files of the groups."""

    def write(own, *files):
        (tmp_path / "own").write_text(own)
        for path, text in (item for each in files for item in each.items()):
            file = tmp_path / "cgroup" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    monkeypatch.setattr(control_groups, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "OWN", tmp_path / "own")
    return write


@pytest.mark.parametrize(("own", "memory", "cpu", "limits"), CASES.values(), ids=CASES)
def test_limits(groups, own, memory, cpu, limits):
    groups(own, memory, cpu)
    assert (control_groups.memory_limit(), control_groups.cpu_limit()) == limits


def test_no_list_of_groups(groups):
    assert (control_groups.memory_limit(), control_groups.cpu_limit()) == (None, None)


def test_no_more_threads_than_cores_whose_time_may_be_used(groups, tmp_path):
    groups("0::/", {"cpu.max": "150000 100000"})
    code = (
        "from pathlib import Path; import torch; from ysnake.shared import cli, control_groups; "
        f"control_groups.ROOT = Path({str(tmp_path / 'cgroup')!r}); "
        f"control_groups.OWN = Path({str(tmp_path / 'own')!r}); "
        "torch.set_num_threads(4); cli.use_threads(None); print(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}

    def threads(**more):
        command = [sys.executable, "-c", code]
        return int(subprocess.check_output(command, env=environment | more, text=True))

    assert threads() == 2
    assert threads(OMP_NUM_THREADS="3") == 4  # the user's choice, which torch has read


@pytest.mark.usefixtures("one_thread")
def test_processes_of_one_machine_share_its_cores(groups, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for limit, processes, expected in (
        *(("max", 1, 4), ("max", 2, 2), ("max", 3, 2), ("max", 8, 1)),
        *(("300000", 1, 3), ("300000", 2, 2)),
    ):
        groups("0::/", {"cpu.max": f"{limit} 100000"})
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        torch.set_num_threads(4)
        cli.use_threads(None)
        assert torch.get_num_threads() == expected
