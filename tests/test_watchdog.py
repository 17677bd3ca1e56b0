"""A loop that stands still for real, and the record of it."""

import json
import subprocess
import sys
import threading
import time

import jax
import pytest

from maxlike.errors import TRY_AGAIN, UserError
from maxlike.train import train
from maxlike.watchdog import Watchdog
from tests import tiny


class StallingBatches:
    """The training batches; reading the one of `step` (from 0) does not end before `until` is set."""

    def __init__(self, batches, step, until):
        self._batches, self._step, self._until = batches, step, until

    def __getattr__(self, name):
        return getattr(self._batches, name)

    def iterate(self, start_step=0, **hosts):
        return StallingIterator(self._batches.iterate(start_step, **hosts), self._step - start_step, self._until)


class StallingIterator:
    def __init__(self, rows, left, until):
        self._rows, self._left, self._until = rows, left, until

    def __enter__(self):
        self._rows.__enter__()
        return self

    def __exit__(self, *error):
        return self._rows.__exit__(*error)

    def __next__(self):
        self._left -= 1
        if self._left == -1:
            the_disk_does_not_answer(self._until)
        return next(self._rows)


def the_disk_does_not_answer(until):
    assert until.wait(120.0), "the watchdog said nothing"


@pytest.mark.large
def test_a_stalled_source_is_recorded_and_training_goes_on(tmp_path, monkeypatch, capsys):
    experiment = tiny.load("sharding.Mesh.shape = {'data': 2}")
    experiment.watchdog = Watchdog(floor=0.5, first=100.0, beside=100.0)
    traces = tmp_path / "run" / "traces"
    recorded = threading.Event()

    def look():  # the stall ends when the record of it is whole
        path, deadline = traces / "process_0_step_6_data.json", time.monotonic() + 120.0
        while time.monotonic() < deadline:
            if path.is_file() and "collectives" in json.loads(path.read_text()):
                recorded.set()
                return
            recorded.wait(0.02)

    make = type(experiment.data).train
    monkeypatch.setattr(
        type(experiment.data), "train", lambda self, **knobs: StallingBatches(make(self, **knobs), 5, recorded)
    )
    threading.Thread(target=look, daemon=True).start()
    train(experiment, tmp_path / "run")
    assert len(tiny.losses(tmp_path / "run")) == experiment.steps
    record = json.loads((traces / "process_0_step_6_data.json").read_text())
    assert (record["phase"], record["step"], record["process"]) == ("data", 6, 0)
    assert record["seconds"] > record["limit"] >= max(0.5, 10 * record["median_step"])
    assert any("the_disk_does_not_answer(self._until)" in line for stack in record["stacks"].values() for line in stack)
    assert {"all-reduce"} == {row["kind"] for row in record["collectives"]}
    assert set(record["memory"]) == {str(device) for device in jax.local_devices()}
    phases = [(row["phase"], row["step"]) for row in record["phases"]]
    assert phases.index(("data", 5)) < phases.index(("step", 5)) and ("checkpoint", 4) in phases
    said = " ".join(capsys.readouterr().out.split())
    assert "step 6 has been waiting" in said and "for its batch" in said and "step 6 went on after" in said


def test_a_watch_is_quiet_over_steps_and_patient_beside_them(tmp_path):
    said = []
    program = jax.jit(lambda x: x).lower(1.0).compile()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    limits = Watchdog(factor=5.0, floor=1e-3, first=60.0, beside=60.0)
    nothing = threading.Event()
    with limits.over(tmp_path / "traces", program, mesh, said.append) as watch:
        for step in range(1, 4):
            with watch("data", step):
                pass
            with watch("step", step):
                nothing.wait(1.0)
            with watch("checkpoint", step):  # far above 5 times the median, in the patience for what is beside
                nothing.wait(0.05)
    assert not said
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize("writable", [True, False])
def test_a_run_that_is_to_abort_ends_with_the_code_that_means_try_again(tmp_path, writable):
    folder = tmp_path / "traces"
    if not writable:
        folder.write_text("a file where the folder should be")
    code = f"""
import pathlib, threading, jax
from maxlike.watchdog import Watchdog
mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
limits = Watchdog(floor=0.05, first=0.05, beside=60.0, abort=True)
with limits.over(pathlib.Path({str(folder)!r}), jax.jit(lambda x: x).lower(1.0).compile(), mesh, print) as watch:
    with watch("step", 1):
        threading.Event().wait(120.0)
"""
    done = subprocess.run([sys.executable, "-u", "-c", code], capture_output=True, text=True)
    assert done.returncode == TRY_AGAIN, done.stderr
    assert "step 1 has been waiting" in done.stdout and "as Watchdog.abort asks" in done.stdout
    assert (folder / "process_0_step_1_step.json").is_file() == writable
    assert ("could not be written" in done.stdout) != writable


@pytest.mark.parametrize("knobs", [{"factor": 1.0}, {"floor": 0.0}, {"first": 9.0}, {"beside": 9.0}])
def test_limits_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=f"Watchdog.{next(iter(knobs))}="):
        Watchdog(**knobs)
