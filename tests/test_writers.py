import contextlib
import json
import resource
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from maxlike.run_dir import RunDirectory
from maxlike.writers import MetricsWriter


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path) as directory:
        yield directory


def records(run):
    return [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]


def events(run):
    """(kind, step, value) of each TensorBoard record, in the order in which TensorBoard reads the files."""
    found = []
    for path in sorted(run.events.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]
            found += [("start", event.step, None)] * (event.session_log.status == 1)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_a_line_is_on_disk_when_write_returns_and_is_strict_json(run):
    writer = MetricsWriter(run)
    writer.write(1, "train", {"loss": jnp.float32(1.5), "tokens": np.int64(3), "grad_norm": float("nan"), "x": np.inf})
    assert records(run) == [{"step": 1, "split": "train", "loss": 1.5, "tokens": 3.0, "grad_norm": None, "x": None}]
    writer.write(1, "validation", {"loss": 2, "note": "text", "none": None})
    assert records(run)[1] == {"step": 1, "split": "validation", "loss": 2, "note": "text", "none": None}
    writer.write(2, "train", {"load/each": [1.0, float("inf")]})
    assert records(run)[2] == {"step": 2, "split": "train", "load/each": [1.0, None]}
    writer.close()
    assert ("train/loss", 1, 1.5) in events(run)
    assert ("train/load/each/00", 2, 1.0) in events(run)
    assert ("validation/loss", 1, 2.0) in events(run)


def test_metrics_do_not_bring_in_pytorch(run):
    code = (
        "import sys; from maxlike import run_dir, writers\n"
        "writer = writers.MetricsWriter(run_dir.RunDirectory(sys.argv[1]))\n"
        "writer.write(1, 'train', {'loss': 1.0}); writer.close()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path / "inner")], check=True)


def test_resuming_leaves_each_step_once(run):
    first = MetricsWriter(run)
    for step in range(1, 6):
        first.write(step, "train", {"loss": float(step)})
    first.close()
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "split": "tr')  # killed while writing
    second = MetricsWriter(run)
    second.truncate(3)
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    for step in (4, 5):
        second.write(step, "train", {"loss": 10.0 + step})
    second.close()
    assert [(record["step"], record["loss"]) for record in records(run)] == [(1, 1), (2, 2), (3, 3), (4, 14), (5, 15)]
    assert events(run)[-3:] == [("start", 4, None), ("train/loss", 4, 14.0), ("train/loss", 5, 15.0)]
    assert not run.file(".metrics.partial").exists()


def test_rewinding_within_one_process(run):
    writer = MetricsWriter(run)
    for step in range(1, 4):
        writer.write(step, "train", {"loss": 1.0})
    writer.truncate(1)
    writer.write(2, "train", {"loss": 2.0})
    writer.close()
    assert [record["step"] for record in records(run)] == [1, 2]


def test_a_full_disk_loses_nothing_and_is_told_once(run):
    said = []
    writer = MetricsWriter(run, say=said.append)
    writer.write(1, "train", {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 10, hard))
        for step in (2, 3):
            writer.write(step, "train", {"loss": 1.0})
        assert [record["step"] for record in records(run)] == [1]
    writer.write(4, "train", {"loss": 1.0})
    writer.close()
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    assert len(said) == 1 and "cannot be written" in said[0]
