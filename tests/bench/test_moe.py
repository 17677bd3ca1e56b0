"""The comparison of a mixture of experts with a dense model, at a size that says nothing about speed."""

import json

import pytest

from maxlike.bench import bench, moe
from tests import tiny


def test_both_models_have_the_same_active_flops():
    flops = {name: one.bare().flops_per_token(moe.LENGTH) for name, one in moe.experiments().items()}
    router = 3 * moe.DEPTH * 2 * moe.DIM * moe.EXPERTS
    assert flops["moe"] == pytest.approx(flops["dense"] + router)
    assert flops["moe"] < 1.01 * flops["dense"]


@pytest.mark.large
def test_moe(tmp_path, monkeypatch):
    tiny_shape = {"DIM": 16, "DEPTH": 1, "HEADS": 2, "VOCAB": 64, "BATCH": 1, "LENGTH": 16, "WIDTH": 8}
    for name, value in (tiny_shape | {"SMALL": 1024, "LARGE": 4096}).items():
        monkeypatch.setattr(moe, name, value)
    (path,) = bench.bench(tiny.load(), name="moe", repeats=2, steps=3, out=str(tmp_path))
    found = {quantity["name"]: quantity for quantity in json.loads(path.read_text())["quantities"]}
    assert len(found["step, mixture"]["values"]) == len(found["step, dense"]["values"]) == 6
    assert found["memory a token of a dropless gradient, 4 times the tokens"]["met"]
