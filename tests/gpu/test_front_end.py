"""Triton's compiler accepts the types of every kernel, in many combinations of the options."""

import json

import pytest
import stand_in_driver
from covering import covering

pytest.importorskip("triton", reason="Triton is for Linux")


def check(*arguments: str) -> None:
    process = stand_in_driver.start("front_end.py", *arguments)
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    result = json.loads(out)
    failures = [
        f"{f['kernel']}: {f['error']}\n  in {f['cases']} launches, first {f['first']}"
        for f in result["failures"]
    ]
    assert not failures, "\n\n".join(failures)
    seen = {name.split(".")[1] for name in result["kernels"]}
    assert seen == {"conv", "layers_step", "loss", "norm", "ssd", "step"}


def test_pairs_of_options():
    check()


@pytest.mark.slow
def test_triples_of_options():
    check("--thorough")


def test_covering_meets_every_pair():
    options = {"a": (0, 1, 2), "b": (0, 1), "c": (0, 1, 2, 3)}
    cases = covering(options)
    assert len(cases) < 3 * 2 * 4
    assert {(case["a"], case["c"]) for case in cases} == {
        (a, c) for a in range(3) for c in range(4)
    }
