"""`--job quantize`: what it writes is a checkpoint of the same experiment, and says where it came from."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import tests.tiny as tiny
from maxlike import passport
from maxlike.errors import UserError
from maxlike.evaluate.validation import evaluate
from maxlike.program import Program
from maxlike.quantize.job import quantize
from maxlike.restore import restore
from maxlike.warm_start import WarmStart


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(experiment, run directory) whose checkpoint has averaged weights that differ from the last ones."""
    run = tmp_path_factory.mktemp("run")
    experiment = tiny.load("step.Step.ema_decay = 0.9")
    program = Program.of(experiment, experiment.mesh.open())
    state = program.init()
    state = state | {"ema": jax.tree.map(lambda x: 1.5 * x, state["params"])}
    store = experiment.checkpoints.open(run / "checkpoints")
    metadata = {
        "next_step": 8,
        "fingerprints": {"tokenizer": experiment.data.tokenizer.fingerprint},
        "config": experiment.config.operative,
        "code": "test",
        "dropped": [],
    }
    store.save(8, state, metadata)
    store.close()
    return experiment, run


@pytest.mark.large
def test_a_quantized_run_is_used_like_any_other(trained, capsys):
    experiment, run = trained
    cost = quantize(experiment, run, bits=4, group=8, batches=3)
    said = capsys.readouterr().out
    target = run / "quantized" / "w4a16kv16_g8"
    assert "validation loss" in said and "bits per byte" in said and "6.000" in said  # 4 + 16 / 8 bits a weight
    report = json.loads((target / "quantize.json").read_text())
    assert report["recipe"]["weights"] == 4 and report["source"] == {"run": str(run), "step": 8}
    assert report["validation"]["after"]["loss"] == cost.after["loss"] and len(report["layers"]) == 7
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert report["layers"][0]["hadamard_blocks"] == {"inputs": None, "outputs": None}

    _, state, step = restore(experiment, target)
    _, original, _ = restore(experiment, run)
    assert step == 8 and (target / "config.gin").is_file()
    codes = safetensors.numpy.load_file(target / "codes.safetensors")
    path = "stack/periods/0/ffn/down/kernel"
    kernel = np.asarray(state["ema"]["stack"]["periods"][0]["ffn"]["down"]["kernel"])
    assert codes[f"{path}/codes"].dtype == np.int8 and np.ptp(codes[f"{path}/codes"]) <= 15
    np.testing.assert_allclose(np.repeat(codes[f"{path}/scales"], 8, 1) * codes[f"{path}/codes"], kernel, rtol=1e-5)
    assert np.array_equal(state["ema"]["embed"]["table"], original["ema"]["embed"]["table"])
    stamps = passport.read(target / "checkpoints" / "8")
    assert [stamp["tool"] for stamp in stamps] == ["quantize"] and stamps[0]["tree"] == "ema"
    assert stamps[0]["done"] == {"recipe": "w4a16kv16_g8"}

    whole = quantize(experiment, run, bits=4, group=8, destination=str(target.with_name("whole")))
    assert evaluate(experiment, target)["loss"] == pytest.approx(whole.after["loss"], rel=1e-5)
    assert whole.tokens > cost.tokens and whole.before["loss"] != whole.after["loss"]

    program = Program.of(experiment, experiment.mesh.open())
    begun, _ = WarmStart(source=str(target))(program.init(), program.state, print)
    assert jnp.array_equal(begun["params"]["stack"]["periods"][0]["ffn"]["down"]["kernel"], kernel)


def test_only_what_flows_quantized_leaves_no_checkpoint(trained, capsys):
    experiment, run = trained
    cost = quantize(experiment, run, bits=16, activation_bits=4, cache_bits=8, batches=1)
    assert "no new checkpoint" in capsys.readouterr().out and cost.rise != 0
    assert [path.name for path in (run / "quantized" / "w16a4kv8").iterdir() if path.name != "lock"] == [
        "quantize.json"
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"bits": 5}, "--bits=5"),
        ({"cache_bits": 7}, "--cache_bits=7"),
        ({"bits": 16}, "nothing to quantize"),
        ({"batches": 0}, "--batches=0"),
        ({"method": "gptq", "rows": 0}, "0 rows is empty"),
        ({"group": 5}, "a group of 5 inputs does not divide"),
        ({"checkpoint": 3, "destination": "new"}, "no checkpoint of step 3"),
    ],
)
def test_refusals(trained, flags, sentence):
    experiment, run = trained
    with pytest.raises(UserError, match=sentence):
        quantize(experiment, run, **flags)


def test_a_directory_that_is_there_is_not_written_into(trained, tmp_path):
    experiment, run = trained
    with pytest.raises(UserError, match="name a new directory"):
        quantize(experiment, run, destination=str(tmp_path))
