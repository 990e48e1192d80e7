"""The long test of robustness: a few seconds of each part, or minutes with `-m slow`."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.faults import files, kills
from benchmarks.faults.__main__ import PARTS, main
from benchmarks.faults.clients import Clients
from benchmarks.faults.kills import KINDS, Kills
from benchmarks.faults.lost import Lost
from benchmarks.faults.requests import Requests
from benchmarks.faults.restarts import Restarts

pytestmark = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="waits for processes as Linux alone can"
)


QUICK = KINDS[1]  # with one process


@pytest.fixture(scope="module")
def trainings(tmp_path_factory, request):
    attack = Kills(tmp_path_factory.mktemp("kills"), seed=0, kinds=request.param)
    yield attack
    attack.close()


@pytest.mark.parametrize("trainings", [(QUICK,)], indirect=True)
def test_trainings_end_as_if_nothing_had_happened(trainings):
    """Each fault once."""
    run = kills.Run(trainings.bench, QUICK, seed="0")
    assert any([fault() for fault in run.faults()])
    run.finish()


@pytest.mark.slow
@pytest.mark.parametrize("trainings", [KINDS], indirect=True)
def test_trainings_of_every_kind_end_as_if_nothing_had_happened(trainings):
    trainings.go(600)


@pytest.mark.parametrize("trainings", [(QUICK,)], indirect=True)
def test_a_training_that_loses_something_is_found(trainings):
    run = kills.Run(trainings.bench, QUICK, seed="0")
    assert run.go_on().codes == [0]
    run.compare()
    state = run.run / "last/training_state.pt"
    content = torch.load(state)
    moments = content["optimizer"]["state"][0]
    moments[min(moments.keys() - {"step"})].view(-1)[0] += 1e-7
    torch.save(content, state)
    (run.run / "last/manifest.json").unlink()
    with pytest.raises(Lost, match="not equal to the undisturbed training: state"):
        run.compare()
    shutil.rmtree(run.run / "last")
    with pytest.raises(Lost, match="cannot be read"):
        run.compare()
    run.remove()


def test_requests_that_no_client_should_send(capsys):
    assert main(["--part", "requests", "--minutes", "0.03"]) == 0
    said = capsys.readouterr().out
    assert "times 200" in said
    assert "times 400" in said
    assert said.endswith("nothing was lost\n")


def test_the_first_loss_ends_it(monkeypatch, capsys):
    class Careless:
        def __init__(self, folder, seed):
            self.folder = folder

        def go(self, seconds):
            raise Lost("a whole checkpoint")

        def close(self):
            (self.folder / "closed").touch()

    monkeypatch.setitem(PARTS, "files", Careless)
    assert main(["--part", "files", "--seed", "9"]) == 1
    said = capsys.readouterr().out
    assert "LOST, with --seed 9: a whole checkpoint" in said
    folder = Path(said.split()[-1])
    assert (folder / "files/closed").exists()
    shutil.rmtree(folder)


@pytest.mark.slow
def test_many_requests_that_no_client_should_send(tmp_path):
    attack = Requests(tmp_path, seed=1)
    attack.go(300)
    attack.close()


@pytest.mark.parametrize(
    ("seconds", "half_open"), [(1.5, 100), pytest.param(120, 1000, marks=pytest.mark.slow)]
)
def test_clients_that_leave_beside_half_open_connections(tmp_path, seconds, half_open):
    attack = Clients(tmp_path, seed=0, half_open=half_open)
    attack.go(seconds)
    attack.close()
    assert attack.results["served"] > 0
    assert attack.results["left"] > 0


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    files.make(folder)
    return folder


@pytest.mark.parametrize("draws", [1, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", files.targets(), ids=lambda target: target.name)
def test_files_of_strangers_load_or_are_refused(good, target, draws):
    files.attack(good, target, seed=0, draws=draws)


def test_a_file_that_gives_a_traceback_is_found(good):
    def fails(folder):
        raise KeyError("weights")

    target = files.Target("model/config.json", "bytes_changed", fails)
    with pytest.raises(KeyError, match="weights"):
        files.attack(good, target, seed=0, draws=1)


@pytest.mark.slow
def test_ranks_that_are_killed_again_and_again(tmp_path):
    Restarts(tmp_path, seed=0, kills=10).go(0)
