"""The plans that are kept: what the formula said of memory, beside what the compiler did."""

import json
import pathlib

import pytest

RECORDS = sorted((pathlib.Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.json"))
COMPILED = [path for path in RECORDS if "compiled" in json.loads(path.read_text())["memory"]]
# The bound that `benchmarks/plans/README.md` states.
BOUND = 0.2


def test_some_plans_are_the_compilers():
    assert COMPILED


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_the_formula_is_near_the_compiler(path):
    memory = json.loads(path.read_text())["memory"]
    state = memory["parameters"] + memory["optimizer"] + memory["other_state"] + memory["batch"]
    assert state == pytest.approx(memory["compiled"]["arguments"], rel=0.01)
    assert memory["predicted"]["peak"] == pytest.approx(memory["compiled"]["peak"], rel=BOUND)
