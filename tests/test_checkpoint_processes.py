"""Two processes of one job save and restore together, and agree on what is damaged."""

import socket
import subprocess
import sys

import pytest

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


@pytest.mark.large
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path), port], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
