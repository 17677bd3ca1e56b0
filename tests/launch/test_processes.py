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

# Before the launcher: what happens at a moment that is hard to hit from outside says so, and waits to be killed.
HOLD = """
import sys, threading

def hold():
    print("held", flush=True)
    threading.Event().wait(100.0)
"""
COMPILING = """
from maxlike.program import Program
prepare = Program.compiler
Program.compiler = lambda self, batch: (prepare(self, batch), lambda: hold())[1]
"""
SAVING = """
from maxlike import checkpoint_files
to_save = checkpoint_files.to_save
checkpoint_files.to_save = lambda flat, record: hold() if record.step == 8 else to_save(flat, record)
"""
REPORTING = """
from maxlike.log import Log
finish = Log.finish
Log.finish = lambda self: hold() if self._chief else finish(self)
"""
LAUNCH = """
from launch.__main__ import main
sys.exit(main())
"""


def free_port() -> int:
    """A port with a free one behind it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return min(probe.getsockname()[1], 60_000)


def start(run: pathlib.Path, processes: int, *bindings: str, held: dict[int, str] | None = None) -> list:
    """held: {process: the moment at which it stands still}."""
    arguments = ["--experiment", "quickstart", *tiny.flags(*bindings), "--run_dir", str(run)]
    arguments += ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    launch = {index: ["-c", HOLD + moment + LAUNCH] for index, moment in (held or {}).items()}
    return [
        subprocess.Popen(
            [sys.executable, *launch.get(index, ["-m", "launch"]), *arguments, "--process", str(index)],
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
def test_a_run_grows_from_one_process_to_two_and_to_four(tmp_path):
    run = tmp_path / "run"
    for count, shape, until in ((1, "{'data': 1}", 15), (2, "{'tensor': 2}", 45), (4, "{'fsdp': 2, 'tensor': 2}", 100)):
        processes = start(run, count, *LONG, f"sharding.Mesh.shape = {shape}")
        if until < 100:
            await_steps(run, until, processes)
            processes[-1].send_signal(signal.SIGTERM)
        said = finish(processes)
        assert ("resuming" in said[0]) == (count > 1)
        assert ("stopped as asked after step" in said[0]) == (until < 100)
    train(tiny.load(*LONG, "sharding.Mesh.shape = {'data': 1}"), tmp_path / "straight")
    assert_same(run, tmp_path / "straight", 1e-5)


@pytest.mark.large
@pytest.mark.parametrize(
    ("victim", "moment", "sent"),
    [
        (1, COMPILING, signal.SIGKILL),
        (1, COMPILING, signal.SIGTERM),  # jax catches it where it is not told otherwise, and tells nobody
        (0, SAVING, signal.SIGKILL),
        (1, SAVING, signal.SIGKILL),
        (0, REPORTING, signal.SIGKILL),  # the others wait for it on their way out
    ],
    ids=["compiling", "compiling-sigterm", "saving-0", "saving-1", "reporting"],
)
def test_whoever_waits_for_a_killed_process_stops_and_names_it(tmp_path, victim, moment, sent):
    run, shape = tmp_path / "run", "sharding.Mesh.shape = {'data': 2}"
    processes = start(run, 2, shape, held={victim: moment})
    while not (line := processes[victim].stdout.readline()).endswith("held\n"):
        assert line, "it ended before that moment"
    time.sleep(1.0)  # the other one comes to where it waits
    processes[victim].send_signal(sent)
    other = processes[1 - victim]
    said = other.communicate(timeout=STOPS_WITHIN)[0]
    assert other.returncode == TRY_AGAIN, said
    assert f"process {victim} (pid {processes[victim].pid} on {socket.gethostname()}) of 2 is gone" in said
    processes[victim].communicate()
    train(tiny.load("sharding.Mesh.shape = {'fsdp': 4}"), run)
    assert sorted(tiny.losses(run)) == list(range(1, 13))


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
@pytest.mark.parametrize("scheduler", ["slurm", "openmpi"])
def test_processes_that_a_scheduler_started_find_and_watch_each_other(tmp_path, scheduler):
    run, port = tmp_path / "run", free_port()
    if scheduler == "slurm":
        job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        names = ("SLURM_PROCID", "SLURM_LOCALID")
    else:  # whom jax.distributed finds, as on a TPU
        job = {"OMPI_MCA_orte_hnp_uri": f"{port << 12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    arguments = ["--experiment", "quickstart", *tiny.flags(*LONG, "sharding.Mesh.shape = {'data': 2}")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments, "--run_dir", str(run)],
            env=os.environ | job | dict.fromkeys(names, str(rank)) | {"XLA_FLAGS": ""},
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
