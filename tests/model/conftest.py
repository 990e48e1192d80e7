"""One server for all tests that only send requests to it, and what trainings need."""

import errno

import ollama
import pytest
import torch
from running_server import serving
from small import saved

from ysnake.training import evaluation


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The checkpoint folder that the server serves."""
    return saved(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(served):
    """The address of the server, and its process."""
    with serving(served, "--weights", "float32") as (address, process):  # exact, to be compared
        yield address, process
        assert process.poll() is None, "the server died"


@pytest.fixture(scope="session")
def address(server):
    return server[0]


@pytest.fixture
def client(address):
    """Ollama's client."""
    with ollama.Client(address) as client:
        yield client


@pytest.fixture
def one_thread():
    """Trainings may set the number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short_samples(monkeypatch):
    """Samples of 8 tokens. Runs in other processes still write long ones."""
    monkeypatch.setattr(evaluation, "SAMPLE_TOKENS", 8)


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has no locks, as some shared folders."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has other locks")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
