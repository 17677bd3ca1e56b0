"""Eight bits against bfloat16, at a size that says nothing about speed."""

import json

import pytest

from layers.low_precision import Float8
from maxlike.bench import bench, precision
from tests import tiny


@pytest.mark.large
def test_precision(tmp_path, monkeypatch):
    assert [arm.emulate for arm in precision.arms().values() if arm is not None] == [True] * 4
    arms = {precision.BASE: None, "float8 tensor": Float8(smallest=16, emulate=True)}
    monkeypatch.setattr(precision, "arms", lambda: arms)
    monkeypatch.setitem(precision.GOALS, "quickstart", ">= 1.15")
    experiment = tiny.load("steps = 4", "stack.Stack.depth = 1", "experiment.Experiment.hooks = (@hooks.Validate(),)")
    (path,) = bench.bench(experiment, name="precision", repeats=2, steps=3, out=str(tmp_path))
    record = json.loads(path.read_text())
    found = {quantity["name"]: quantity for quantity in record["quantities"]}
    assert len(found["tokens/s, bfloat16"]["values"]) == len(found["tokens/s, float8 tensor"]["values"]) == 2
    assert record["details"]["emulated"] and not found["tokens/s, fastest float8 / bfloat16"]["goal"]

    (path,) = bench.bench(experiment, name="precision_loss", repeats=1, steps=3, out=str(tmp_path))
    found = {quantity["name"]: quantity for quantity in json.loads(path.read_text())["quantities"]}
    ours, base = (found[f"validation loss, {name}"]["values"] for name in ("float8 tensor", "bfloat16"))
    departure = found["validation loss, float8 tensor: departure from bfloat16"]
    assert ours != base and departure["values"] == [abs(ours[0] / base[0] - 1)] and departure["met"]
    assert experiment.step.compute_dtype == "float32" and experiment.products is None
