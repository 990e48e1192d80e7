"""Renaming, replacing and syncing where a system refuses for a moment, or cannot do it at all."""

import errno
import os
import stat

import pytest
from small import model

from ysnake.checkpoints import checkpoint
from ysnake.shared import files
from ysnake.shared.errors import InputError


@pytest.fixture
def windows(monkeypatch):
    """Try again, as on Windows."""
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "POLL", 0.001)


def refusing(times):
    """A change that is refused this many times, and then made."""
    left = [PermissionError(errno.EACCES, "Access is denied")] * times

    def change():
        if left:
            raise left.pop()
        return "made"

    return change


def test_windows_tries_again(windows):
    assert files.patiently(refusing(5)) == "made"


def test_windows_gives_up_after_a_while(windows, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.01)
    with pytest.raises(PermissionError):
        files.patiently(refusing(10**6))


@pytest.mark.skipif(files.WINDOWS, reason="Windows tries again")
def test_other_systems_fail_at_once():
    with pytest.raises(PermissionError):
        files.patiently(refusing(1))


def test_a_folder_moves_into_the_place_of_another(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.move_folder(tmp_path / "new", tmp_path / "old")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "old",
        "old/new",
    ]


def fails_for(kind, number, monkeypatch):
    """Let fsync fail for files of this kind."""
    real = os.fsync

    def fsync(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    fails_for(stat.S_ISDIR, errno.EINVAL, monkeypatch)
    checkpoint.save(tmp_path / "model", model())
    assert (tmp_path / "model/config.json").is_file()


@pytest.mark.parametrize(
    ("kind", "number"), [(stat.S_ISREG, errno.EINVAL), (stat.S_ISDIR, errno.EIO)]
)
def test_a_failed_sync_is_an_error(tmp_path, monkeypatch, kind, number):
    fails_for(kind, number, monkeypatch)
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(tmp_path / "model", model())
    assert not (tmp_path / "model").exists()
