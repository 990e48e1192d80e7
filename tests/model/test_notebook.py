"""docs/first-steps.ipynb runs from its first cell to its last."""

import pytest
from small import ROOT, environment

NOTEBOOK = ROOT / "docs/first-steps.ipynb"


@pytest.mark.slow  # the quick preset is the smallest that the page shows
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for long, short in (("max_steps=100", "max_steps=3"), ("max_steps=120", "max_steps=4")):
            cell.source = cell.source.replace(long, short)
    client(notebook, timeout=900).execute(cwd=str(tmp_path), env=environment())
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").read_text().count("\n") == 4
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [str(cell.outputs) for cell in cells]
    assert f"TrainedRun(path={run.relative_to(tmp_path)!r}" in shown[0]
    assert "image/png" in shown[1]
    assert all(cell.outputs for cell in cells)


def test_it_has_no_outputs_that_grow_old():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
