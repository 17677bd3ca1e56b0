"""Processes of the operating system under jax.distributed train one run: as one process with as many devices does,
through a kill of one of them, and on from its checkpoints with other processes on another mesh."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from maxlike.errors import TRY_AGAIN
from maxlike.train import train
from tests import tiny

# In 100 steps the rounding of another mesh grows to 1e-6 of the loss, in 200 to 1e-4.
LONG = ("steps = 100", "checkpoint.Checkpoints.every = 10")
STOPS_WITHIN = 20.0  # seconds; what is seen is below one, on a machine that does nothing else


def free_port() -> int:
    """A port with a free one behind it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return min(probe.getsockname()[1], 60_000)


def start(run: pathlib.Path, processes: int, *bindings: str) -> list[subprocess.Popen]:
    arguments = ["--experiment", "quickstart", *tiny.flags(*bindings), "--run_dir", str(run)]
    arguments += ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments, "--process", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]


def await_steps(run: pathlib.Path, steps: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < steps:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, [process.communicate()[0] for process in ended]
        time.sleep(0.01)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def assert_same(broken: pathlib.Path, straight: pathlib.Path, rtol: float) -> None:
    one, other = tiny.losses(broken), tiny.losses(straight)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=rtol)


@pytest.mark.large
def test_a_killed_process_is_named_and_the_run_goes_on_elsewhere(tmp_path):
    run = tmp_path / "run"
    processes = start(run, 2, *LONG, "sharding.Mesh.shape = {'data': 2}")
    await_steps(run, 15, processes)
    processes[1].send_signal(signal.SIGKILL)
    said = processes[0].communicate(timeout=STOPS_WITHIN)[0]
    assert processes[0].returncode == TRY_AGAIN, said
    assert f"maxlike: process 1 (pid {processes[1].pid} on {socket.gethostname()}) of 2 is gone" in said
    processes[1].communicate()
    other_mesh = "sharding.Mesh.shape = {'fsdp': 4, 'tensor': 2}"
    train(tiny.load(*LONG, other_mesh), run)
    train(tiny.load(*LONG, other_mesh), tmp_path / "straight")
    assert_same(run, tmp_path / "straight", 1e-5)


@pytest.mark.large
@pytest.mark.parametrize("victim", [0, 3])
def test_four_processes_lose_one_and_two_go_on(tmp_path, victim):
    run = tmp_path / "run"
    processes = start(run, 4, *LONG, "sharding.Mesh.shape = {'fsdp': 4}")
    await_steps(run, 15, processes)
    processes[victim].send_signal(signal.SIGKILL)
    for index, process in enumerate(processes):
        said = process.communicate(timeout=STOPS_WITHIN)[0]
        if index != victim:
            assert process.returncode == TRY_AGAIN, said
            assert f"process {victim} (pid {processes[victim].pid} on {socket.gethostname()}) of 4 is gone" in said
    said = finish(start(run, 2, *LONG, "sharding.Mesh.shape = {'data': 2}"))
    assert "resuming" in said[0] and "resuming" not in said[1]
    train(tiny.load(*LONG, "sharding.Mesh.shape = {'data': 1}"), tmp_path / "straight")
    assert_same(run, tmp_path / "straight", 1e-5)


@pytest.mark.large
def test_one_process_is_asked_to_stop_and_all_save_and_go_on_bit_for_bit(tmp_path):
    run, shape = tmp_path / "run", "sharding.Mesh.shape = {'data': 2}"
    processes = start(run, 2, *LONG, shape)
    await_steps(run, 15, processes)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    assert "stopped as asked after step" in said[0]
    assert len(tiny.losses(run)) < 100
    finish(start(run, 2, *LONG, shape))
    finish(start(tmp_path / "straight", 2, *LONG, shape))
    assert tiny.losses(run) == tiny.losses(tmp_path / "straight")


@pytest.mark.large
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_processes_that_share_rows_read_the_same_ones(tmp_path, axis):
    short = ("steps = 5", f"sharding.Mesh.shape = {{'{axis}': 2}}")
    finish(start(tmp_path / "run", 2, *short))
    train(tiny.load(*short), tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight", 1e-5)


@pytest.mark.large
def test_processes_that_a_scheduler_started_find_and_watch_each_other(tmp_path):
    run, slurm = tmp_path / "run", {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    slurm |= {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "1"}
    arguments = ["--experiment", "quickstart", *tiny.flags(*LONG, "sharding.Mesh.shape = {'data': 2}")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments, "--run_dir", str(run)],
            env=os.environ | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    await_steps(run, 15, processes)
    processes[0].send_signal(signal.SIGKILL)
    said = processes[1].communicate(timeout=STOPS_WITHIN)[0]
    assert processes[1].returncode == TRY_AGAIN, said
    assert f"process 0 (pid {processes[0].pid} on {socket.gethostname()}) of 2 is gone" in said
    processes[0].communicate()
