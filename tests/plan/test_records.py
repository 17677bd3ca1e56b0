"""The plans that are kept: what the formula said of memory, beside what the compiler did."""

import json
import pathlib

import pytest

RECORDS = sorted((pathlib.Path(__file__).parents[2] / "benchmarks" / "plans").glob("*.json"))
COMPILED = [path for path in RECORDS if "compiled" in json.loads(path.read_text())["memory"]]
# The bound that `benchmarks/plans/README.md` states.
BOUND = 0.2
# Which are further away, and by how much, as that page says. They may come nearer, not go further.
FURTHER = {"gpt_1t-v5p_16x16x16": 0.4, "moma_1_4b-v6e_8x8": 0.22}


def test_some_plans_are_the_compilers():
    assert COMPILED


@pytest.mark.parametrize("path", COMPILED, ids=lambda path: path.stem)
def test_the_formula_is_near_the_compiler(path):
    memory = json.loads(path.read_text())["memory"]
    state = memory["parameters"] + memory["optimizer"] + memory["other_state"] + memory["batch"]
    # The compiler pads what it holds to whole tiles, of which narrow parts have many: longcat_flash 1.3 %, moma 0.7 %.
    assert state == pytest.approx(memory["compiled"]["arguments"], rel=0.02)
    assert memory["predicted"]["peak"] == pytest.approx(memory["compiled"]["peak"], rel=FURTHER.get(path.stem, BOUND))
