"""One server for all tests that only send requests to it."""

import ollama
import pytest
from running_server import serving
from small import saved


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The checkpoint folder that the server serves."""
    return saved(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(served):
    """The address of the server, and its process."""
    with serving(served) as (address, process):
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
