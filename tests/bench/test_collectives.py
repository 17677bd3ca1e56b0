"""The benchmarks that only compile, at a size that says nothing."""

import json
import subprocess

import pytest

from maxlike import config
from maxlike.bench import bench, collectives, lower
from maxlike.errors import UserError
from tests import tiny

SMALL = ("vocab = 256", "dim = 32", "depth = 2", "heads = 4", "width = 64", *collectives.SHAPE[5:])


def test_what_is_sent_is_held_against_the_formula(tmp_path, monkeypatch):
    monkeypatch.setattr(collectives, "SHAPE", SMALL)
    monkeypatch.setattr(collectives, "LAYOUTS", {"data": "{'data': 8}"})
    (path,) = bench.bench(tiny.load(), name="collectives", repeats=1, steps=3, out=str(tmp_path))
    record = json.loads(path.read_text())
    (quantity,) = record["quantities"]
    assert quantity["name"].startswith("data: ") and quantity["goal"] == "<= 0.05" and quantity["met"]
    gradients = record["details"]["data: all-reduce over data"]
    departures = [abs(row["bytes"] / row["formula"] - 1) for row in record["details"].values()]
    assert quantity["values"] == [pytest.approx(max(departures))] and gradients["bytes"] > 0

    monkeypatch.setattr(collectives.traffic, "predict", lambda *_: [])
    (path,) = bench.bench(tiny.load(), name="collectives", repeats=1, steps=3, out=str(tmp_path))
    assert not json.loads(path.read_text())["quantities"][0]["met"]


def test_with_fewer_devices_a_process_simulates_eight(tmp_path, monkeypatch):
    """Its record is read back; what it says at its end is the user's sentence."""
    asked = []

    def run(command, env, **_):
        asked.append((command, env["XLA_FLAGS"]))
        if len(asked) > 1:
            return subprocess.CompletedProcess(command, 2, "", "no such experiment")
        folder = command[command.index("--out") + 1]
        quantity = {"name": "data: x", "unit": "", "values": [0.01], "goal": "<= 0.05", "median": 0.01, "met": True}
        (tmp_path / "there").symlink_to(folder)
        (tmp_path / "there/records").mkdir()
        (tmp_path / "there/records/collectives-cpu.json").write_text(
            json.dumps({"quantities": [quantity], "details": {"a": 1}})
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(collectives.jax, "device_count", lambda: 1)
    monkeypatch.setattr(collectives.subprocess, "run", run)
    result = collectives.measure(tiny.load(), 1, 3)
    assert result.quantities[0].met and result.quantities[0].values == [0.01] and result.details == {"a": 1}
    command, flags = asked[0]
    assert command[command.index("--experiment") + 1] == "quickstart"
    assert "--xla_force_host_platform_device_count=8" in flags
    with pytest.raises(UserError, match="ended with code 2: no such experiment"):
        collectives.measure(tiny.load(), 1, 3)


@pytest.mark.large
def test_lowering_is_timed_by_depth(tmp_path, monkeypatch):
    load, depths = config.load, []
    small = (
        "vocab = 64", "dim = 16", "attention.Attention.heads = 2", "attention.Attention.kv_heads = 2",
        "mlp.GatedMLP.width = 16", "experiment.Experiment.batch_size = 1", "step.Step.micro_batches = 1",
        "experiment.Experiment.sequence_length = 8",
    )  # fmt: skip

    def loaded(name, overlays, bindings):
        made = load(name, overlays=overlays, bindings=[*bindings, *small])
        depths.append(made.bare().stack.repeats)
        return made

    monkeypatch.setattr(config, "load", loaded)
    monkeypatch.setattr(lower, "DEPTHS", (1, 3))
    (path,) = bench.bench(None, name="lower", repeats=1, steps=3, out=str(tmp_path))
    found = {quantity["name"]: quantity for quantity in json.loads(path.read_text())["quantities"]}
    assert depths == [1, 3] and found["trace and lower, 3 layers"]["met"]
    ratio = found["compile, 3 layers / 1 layers"]
    assert ratio["goal"] == "<= 1.2" and ratio["median"] > 0 and found["compile, 3 layers"]["median"] > 0
