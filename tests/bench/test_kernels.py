"""The benchmark of implementations, at a size that measures nothing."""

import dataclasses
import json

import numpy as np
import pytest

from layers import kernels as implementations
from maxlike.bench import bench, kernels
from tests import tiny

SIZES = kernels.Sizes(
    heads=2, head_dim=8, tokens=256, dtype="float32", lengths=(128, 256), whole=128, experts=2, width=8, vocab=32
)


def test_every_choice_is_measured_against_the_others_of_its_round(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "CPU", dataclasses.replace(SIZES, lengths=(128,)))
    (path,) = bench.bench(tiny.load(), name="kernels", repeats=2, steps=3, out=str(tmp_path))
    record = json.loads(path.read_text())
    assert path.name == "kernels-cpu.json" and record["details"]["whole"] == 128
    milliseconds = record["details"]["milliseconds"]
    assert milliseconds.keys() == record["details"]["temporary_bytes"].keys()
    found = {quantity["name"]: quantity for quantity in record["quantities"]}
    taken = {name.split(",")[0]: quantity for name, quantity in found.items() if name.endswith(", taken")}
    assert taken.keys() >= {"attention", "recurrence", "dual_chunk", "cross_entropy", "grouped_matmul"}
    assert all(quantity["goal"] == kernels.NEAR for quantity in taken.values())
    assert {name for name in found if name.startswith("attention, 128: ")} == {
        "attention, 128: blocked, taken", "attention, 128: chunked", "attention, 128: xla"
    }  # fmt: skip
    for name, quantity in found.items():
        case, _, implementation = name.removesuffix(", taken").partition(": ")
        fastest = milliseconds[f"{case}: {quantity['unit'].removeprefix('of ')}"]
        ours = milliseconds[f"{case}: {implementation}"]
        assert quantity["values"] == [pytest.approx(a / b) for a, b in zip(ours, fastest, strict=True)]
        assert np.median(ours) >= np.median(fastest) > 0


def test_the_losses_of_a_case_are_the_same_number():
    """Of every implementation; and scores of rows that are too long for it are never held whole."""
    cases = list(kernels.cases(SIZES))
    names = {case.name: set(case.losses) for case in cases}
    assert "xla" not in names["attention, 256"] and "dual_chunk, 256" not in names and "dual_chunk, 128" in names
    for case in cases:
        if case.name in ("dual_chunk, 128", "attention, 128", "grouped_matmul, 256", "recurrence, 256"):
            assert case.losses.keys() <= set(implementations.IMPLEMENTATIONS[case.name.split(",")[0]])
        assert case.taken in case.losses
        if case.name in ("cross_entropy, 256", "grouped_matmul, 32"):
            values = [float(loss(*case.arrays)) for loss in case.losses.values()]
            np.testing.assert_allclose(values, values[0], rtol=1e-5)
