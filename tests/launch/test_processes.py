"""Two operating-system processes under jax.distributed train one run."""

import os
import socket
import subprocess
import sys

import numpy as np

from maxlike.train import train
from tests import tiny


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_two_devices_do(tmp_path):
    shape = "sharding.Mesh.shape = {'data': 2}"
    arguments = ["--experiment", "quickstart", *tiny.flags(shape), "--run_dir", str(tmp_path / "two")]
    arguments += ["--coordinator", f"localhost:{free_port()}", "--processes", "2"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments, "--process", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    train(tiny.load(shape), tmp_path / "one")
    two, one = tiny.losses(tmp_path / "two"), tiny.losses(tmp_path / "one")
    assert two.keys() == one.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    assert "step 12/12" in said[0] and "step 12/12" not in said[1]
