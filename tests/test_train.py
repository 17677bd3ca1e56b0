"""The loop: a resumed run is an uninterrupted one, bit for bit; bad steps follow the policy; a run leaves its files."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from maxlike import interrupt
from maxlike.errors import Diverged, UserError
from maxlike.evaluate.validation import evaluate
from maxlike.guard import Guard
from maxlike.hooks import Hook, Validate
from maxlike.metrics import Mean
from maxlike.step import Step
from maxlike.train import agree_after, train
from maxlike.warm_start import WarmStart
from tests import tiny


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def __call__(self, step, state, metrics):
        if step == self.step:
            interrupt.request()


@pytest.fixture(autouse=True)
def nobody_asked_to_stop():
    interrupt.clear()
    yield
    interrupt.clear()


def stopped_and_resumed(run, stops, overlays=(), workers=0):
    """Losses of a run that was stopped after each of `stops`; the last part reads with `workers` processes."""
    for stop in stops:
        train(dataclasses.replace(tiny.load(overlays=overlays), hooks=(StopAt(stop),)), run)
        assert max(tiny.losses(run)) == stop
        interrupt.clear()
    train(tiny.load(f"data.Data.workers = {workers}", overlays=overlays), run)
    return tiny.losses(run)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight")
    train(tiny.load(), run)
    return run


def test_a_run_leaves_what_it_should(straight):
    rows = tiny.rows(straight)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert row["tokens_per_second"] > 0 and 0 <= row["input_wait"] <= 1 and row["learning_rate"] >= 0
        assert {"loss", "bits_per_byte", "grad_norm", "skipped"} <= set(row)
    assert (straight / "report.html").is_file() and (straight / "loss.png").is_file()
    assert "experiment.Experiment.steps" in (straight / "config.gin").read_text()
    assert sorted(int(p.name) for p in (straight / "checkpoints").iterdir() if p.name.isdigit()) == [8, 12]


def test_training_again_does_nothing(straight, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    train(tiny.load(), straight)
    assert "already trained to step 12" in capsys.readouterr().out
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("workers", [0, 1, pytest.param(4, marks=pytest.mark.large)])
def test_resumed_equals_straight(straight, tmp_path, workers):
    assert stopped_and_resumed(tmp_path, [3, 7], workers=workers) == tiny.losses(straight)


@pytest.mark.large
def test_resumed_equals_straight_on_eight_devices(straight, tmp_path):
    overlays = ("mesh/fsdp_tp",)
    train(tiny.load(overlays=overlays), tmp_path / "straight")
    alone = tiny.losses(tmp_path / "straight")
    assert stopped_and_resumed(tmp_path / "resumed", [5], overlays=overlays) == alone
    one_device = tiny.losses(straight)
    np.testing.assert_allclose(list(alone.values()), list(one_device.values()), rtol=1e-5)


def test_resumes_on_another_mesh_and_says_so(straight, tmp_path, capsys):
    train(dataclasses.replace(tiny.load(overlays=("mesh/fsdp_tp",)), hooks=(StopAt(6),)), tmp_path)
    interrupt.clear()
    train(tiny.load(), tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since")]
    assert told == [
        "changed since the checkpoint of step 6, was: sharding.Mesh.shape = {'fsdp': -1, 'tensor': 2}",
        "changed since the checkpoint of step 6, now: sharding.Mesh.shape = {'data': 1}",
    ]
    got, want = tiny.losses(tmp_path), tiny.losses(straight)
    np.testing.assert_allclose([got[k] for k in want], list(want.values()), rtol=1e-5)


@pytest.mark.large
def test_resumes_on_more_devices(straight, tmp_path):
    begun = tiny.load("sharding.Mesh.shape = {'fsdp': 2}", overlays=("mesh/fsdp",))
    train(dataclasses.replace(begun, hooks=(StopAt(6),)), tmp_path)
    interrupt.clear()
    train(tiny.load(overlays=("mesh/fsdp_tp",)), tmp_path)  # all eight
    got, want = tiny.losses(tmp_path), tiny.losses(straight)
    np.testing.assert_allclose([got[k] for k in want], list(want.values()), rtol=1e-5)


def test_validation_is_logged_and_equals_the_job(tmp_path, capsys):
    experiment = dataclasses.replace(tiny.load(), hooks=(Validate(every=7),))
    train(experiment, tmp_path)
    rows = tiny.rows(tmp_path, "validation")
    assert [row["step"] for row in rows] == [7, 12]
    capsys.readouterr()
    metrics = evaluate(tiny.load(), tmp_path)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["step"] == 12 and printed["loss"] == metrics["loss"]
    assert metrics["bits_per_byte"] == rows[-1]["bits_per_byte"]


class Poisoned:
    """The experiment's objective, not a number on the batches whose inputs sum to one of `sums`."""

    def __init__(self, objective, sums):
        self.objective, self.sums = objective, sums

    def __call__(self, model, batch, key):
        loss, metrics = self.objective(model, batch, key)
        total = batch["inputs"].sum()
        hit = jnp.any(jnp.asarray([total == s for s in self.sums]))
        factor = jnp.where(hit & (key is not None), jnp.nan, 1.0)
        return Mean(loss.total * factor, loss.weight), metrics


def poisoned(guard, steps=(4, 5)):
    experiment = tiny.load()
    batches = experiment.data.train(sequence_length=32, batch_size=8, seed=0)
    sums = [int(batches.batch(step)["inputs"].sum()) for step in steps]
    assert len({int(batches.batch(step)["inputs"].sum()) for step in range(12)}) == 12
    return dataclasses.replace(experiment, objective=Poisoned(experiment.objective, sums), step=Step(guard=guard))


def test_a_bad_step_is_skipped_and_named(tmp_path, capsys):
    train(poisoned(Guard()), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "step 5 is bad: loss" in out and "documents austen: " in out and "its update was dropped" in out
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows if row["bad"]] == [5, 6] and rows[-1]["skipped"] == 2


def test_too_many_bad_steps_in_a_row_stop(tmp_path):
    with pytest.raises(Diverged, match=r"step 6 is bad: .*documents austen.*2 bad steps in a row"):
        train(poisoned(Guard(patience=2)), tmp_path)


def test_the_policy_stop(tmp_path):
    with pytest.raises(Diverged, match=r"step 5 is bad.*--job data --step 4"):
        train(poisoned(Guard(on_bad="stop")), tmp_path)
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_the_policy_rewind_goes_back_and_drops_what_led_there(tmp_path, capsys):
    train(poisoned(Guard(on_bad="rewind")), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "going back to step 4; the updates of steps 5 to 5 will be dropped" in out
    assert "going back to step 4; the updates of steps 5 to 6 will be dropped" in out
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_warm_start_begins_with_the_other_runs_parameters(straight, tmp_path):
    experiment = dataclasses.replace(tiny.load(), hooks=(StopAt(1),), warm_start=WarmStart(source=str(straight)))
    train(experiment, tmp_path)
    assert tiny.losses(tmp_path)[1] < tiny.losses(straight)[1]


def test_another_model_in_the_run_directory_is_a_table(straight):
    with pytest.raises(UserError, match=r"of another model or optimizer(.|\n)*embed/table"):
        train(tiny.load("dim = 32", "steps = 20"), straight)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer has 2048 ids and LanguageModel.vocab is 2000"):
        train(tiny.load("vocab = 2000"), tmp_path)


def test_changed_data_are_refused(straight):
    with pytest.raises(UserError, match="changed since checkpoint 12"):
        train(tiny.load("train/sources.Text.end_byte = -150000", "steps = 20"), straight)
    with pytest.raises(UserError, match=r"order .* changed since checkpoint 12"):
        train(tiny.load("experiment.Experiment.seed = 1", "steps = 20"), straight)


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 10), (0.1, 10), (1.0, 5), (2.4, 2), (60.0, 1)])
def test_processes_agree_often_enough_to_save_before_a_machine_is_taken_back(seconds, steps):
    assert agree_after(seconds) == steps
