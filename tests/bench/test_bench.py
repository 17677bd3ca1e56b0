"""The measurements themselves, at a size that says nothing about speed."""

import json

import jax
import pytest

from maxlike import config
from maxlike.bench import bench, data, torch_llama
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAXLIKE_CACHE", str(tmp_path / "cache"))


def quantities(path) -> dict[str, float]:
    record = json.loads(path.read_text())
    assert record["environment"]["cores"] >= 1
    return {quantity["name"]: quantity["median"] for quantity in record["quantities"]}


def test_train(tmp_path):
    (path,) = bench.bench(tiny.load(), name="train", repeats=2, steps=3, out=str(tmp_path))
    assert path.name == "train_quickstart-cpu.json"
    found = quantities(path)
    assert found["tokens a second"] > 0 and "MFU" not in found  # the peak of a CPU is not known
    assert len(json.loads(path.read_text())["quantities"][1]["values"]) == 6


@pytest.mark.large
def test_loop(tmp_path):
    (path,) = bench.bench(tiny.load(), name="loop", repeats=1, steps=6, out=str(tmp_path))
    assert 0 <= quantities(path)["waiting for input"] <= 100


def test_data(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_BYTES", 100_000)
    monkeypatch.setattr(data, "READ_SECONDS", 0.0)
    (path,) = bench.bench(tiny.load(), name="data", repeats=1, steps=3, out=str(tmp_path))
    assert all(value > 0 for value in quantities(path).values())
    assert json.loads(path.read_text())["details"]["text_bytes"] >= 100_000


def test_both_llamas_have_the_same_shape():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    experiment = config.load("llama_1b", overlays=["cpu"], bindings=torch_llama.SHAPE)
    ours = sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(torch_llama.llama_config(transformers))
    assert ours == sum(weight.numel() for weight in theirs.parameters())
    assert (experiment.batch_size, experiment.sequence_length) == (torch_llama.BATCH, torch_llama.LENGTH)
    assert experiment.step.compute_dtype == "float32"
