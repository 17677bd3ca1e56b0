"""Checkpoints on a disk that fails or is full, and in a process that is killed."""

import contextlib
import resource
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike import manifest
from maxlike.checkpoint import Checkpoints

PRINTS = {"tokenizer": "t1"}
META = {"data_position": 7, "config": "a.b = 1", "fingerprints": PRINTS, "revision": "abc"}


@contextlib.contextmanager
def files_no_larger_than(size):
    """Writing past `size` bytes fails as on a full disk, in any library of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("size", [1 << 18, 100])  # inside the arrays; inside everything, the metadata too
def test_a_full_disk_is_told_and_counted_and_the_last_good_checkpoint_stays(open_store, said, asynchronous, size):
    store = open_store(asynchronous=asynchronous)
    x = jnp.arange(1 << 18, dtype=jnp.float32)
    store.save(1, {"x": x}, META)
    store.wait()
    for step in (2, 3):
        with files_no_larger_than(size):
            store.save(step, {"x": x + step}, META)
            store.wait()
    assert store.failures == 2
    assert len(said) == 2
    assert (
        "step 2 could not be saved" in said[0] and "File too large" in said[0] and "last good one is step 1" in said[0]
    )
    assert store.steps() == [1]
    store.save(4, {"x": x + 4}, META)
    store.wait()
    assert sorted(path.name for path in store.directory.iterdir()) == ["1", "4"]
    restored, _ = store.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, PRINTS)
    np.testing.assert_array_equal(restored["x"], x + 4)


def test_a_disk_that_fails_at_the_manifest_or_at_once_is_told_and_counted(open_store, said, monkeypatch):
    store = open_store()
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        store.save(1, {"x": jnp.ones(2)}, META)
        store.wait()
    assert store.failures == 1 and "No space left on device" in said[0] and "there is no checkpoint yet" in said[0]
    assert list(store.directory.iterdir()) == []
    shutil.rmtree(store.directory)
    store.directory.write_text("not a directory")
    store.save(2, {"x": jnp.ones(2)}, META)
    store.wait()
    assert store.failures == 2


KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from maxlike import checkpoint, checkpoint_files, manifest

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

stage, directory = sys.argv[1:]
store = checkpoint.Checkpoints(keep=1).open(pathlib.Path(directory))
for step in (1, 2, 3):
    store.wait()
    if step == 3 and stage == "manifest":
        manifest.write = die
    if step == 3 and stage == "removing":
        checkpoint_files.shutil.rmtree = lambda path, ignore_errors=False: None if ignore_errors else die()
    store.save(step, {"x": jnp.full(1 << 20, step)}, {"data_position": step})
    if step == 3 and stage == "writing":
        die()
store.close()
"""


@pytest.mark.large
def test_sigkill_at_any_stage_of_a_save_leaves_a_good_checkpoint(tmp_path):
    survives = {"writing": 2, "manifest": 2, "removing": 3}
    children = {
        stage: subprocess.Popen([sys.executable, "-c", KILLED, stage, str(tmp_path / stage)], stderr=subprocess.PIPE)
        for stage in survives
    }
    for stage, child in children.items():
        errors = child.communicate()[1].decode()
        assert child.returncode == -signal.SIGKILL, errors
        before = sorted(path.name for path in (tmp_path / stage).iterdir())
        assert len(before) == 2, before  # the good one and what the kill left
        store = Checkpoints().open(tmp_path / stage)
        state, metadata = store.restore({"x": jax.ShapeDtypeStruct((1 << 20,), jnp.int32)}, {})
        store.close()
        assert int(state["x"].min()) == int(state["x"].max()) == metadata["data_position"] == survives[stage]
        assert [path.name for path in (tmp_path / stage).iterdir()] == [str(survives[stage])]
