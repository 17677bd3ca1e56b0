"""Two processes of one job save and restore together, and agree on what is damaged."""

import os
import socket
import subprocess
import sys

import pytest

from tests import tiny

PROCESS = """
import pathlib, sys
import jax
rank, directory, port = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maxlike.checkpoint import Checkpoints
from maxlike.errors import UserError

mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
make = jax.jit(
    lambda k: {"w": jnp.arange(16.0) * k, "r": jnp.ones(3) * k, "key": jax.random.key(3)},
    out_shardings={"w": split, "r": whole, "key": whole},
    static_argnums=0,
)
form = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(1))
said = []
store = Checkpoints(keep=2).open(directory, say=said.append)
for step in (1, 2, 3):
    store.save(step, make(step), {"step": step})

def spoil(step):
    multihost_utils.sync_global_devices("before")
    if rank == 0:
        (directory / str(step) / "manifest.json").write_text("{}")
    multihost_utils.sync_global_devices("after")

def check(step):
    state, metadata = store.restore(form, {})
    assert metadata == {"step": step}, metadata
    half = np.arange(16.0, dtype=np.float32)[8 * rank : 8 * rank + 8] * step
    np.testing.assert_array_equal(state["w"].addressable_data(0), half)
    np.testing.assert_array_equal(state["r"].addressable_data(0), np.full(3, step))

check(3)
spoil(3)
check(2)
assert len(said) == (rank == 0), said
spoil(2)
try:
    store.restore(form, {})
    sys.exit("restored what is damaged")
except UserError:
    pass
store.close()
"""


# Training with a bad step just after a checkpoint, to which process 0 gives its name a second late.
REWIND = """
import dataclasses, sys, threading
import jax
rank, directory, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import absl.flags
absl.flags.FLAGS(["test"])
from maxlike import manifest
from maxlike.guard import Guard
from maxlike.train import train
from tests import test_train, tiny
if rank == 0:
    write = manifest.write
    manifest.write = lambda *arguments: (threading.Event().wait(1.0), write(*arguments))
mesh = tiny.load("sharding.Mesh.shape = {'data': 2}").mesh
train(dataclasses.replace(test_train.poisoned(Guard(on_bad="rewind")), mesh=mesh), directory)
"""


def run_two(code: str, directory) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(directory), port],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.large
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
    run_two(PROCESS, tmp_path)


@pytest.mark.large
def test_two_processes_rewind_to_a_checkpoint_that_was_still_being_named(tmp_path):
    run_two(REWIND, tmp_path)
    rows = tiny.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
