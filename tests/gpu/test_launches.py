"""Every operator, training and decoding compile for a GPU and launch, on a stand-in for its driver.

The other tests run kernels in Triton's interpreter, which accepts what the compiler does not.
"""

import json

import pytest
import stand_in_driver

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.skipif(
    stand_in_driver.missing() is not None, reason=str(stand_in_driver.missing())
)


def check(*runs: tuple[str, ...]) -> None:
    """All cases of the runs, which share the cores, launch something."""
    started = [stand_in_driver.start("launches.py", *arguments) for arguments in runs]
    for process in started:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        rows = [json.loads(line) for line in out.splitlines()]
        failed = [f"{row['case']}: {row['error']}" for row in rows if "error" in row]
        assert not failed, "\n\n".join(failed)
        assert all(row["launches"] > 0 for row in rows), rows


def test_operators_and_model():
    check(("operators",), ("model",))


@pytest.mark.slow
def test_every_dtype_and_form_at_usual_sizes():
    check(("operators", "--thorough"), ("model", "--thorough"))
