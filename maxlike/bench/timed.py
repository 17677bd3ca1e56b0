"""Timing the compiled step of an experiment on made-up tokens."""

import time

import jax
import numpy as np

from maxlike.experiment import Experiment
from maxlike.program import Program


def random_batch(experiment: Experiment, vocab: int) -> dict[str, np.ndarray]:
    """A full batch of random tokens: one document a row, no padding, so that every position counts."""
    shape = (experiment.batch_size, experiment.sequence_length)
    tokens = np.random.default_rng(0).integers(0, vocab, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_weights": np.ones(shape, np.float32),
        "target_bytes": np.full(shape, 4, np.int32),
    }


def step_seconds(experiment: Experiment, steps: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of `steps` training steps, each waited for, after `warm_up` that do not count."""
    program = Program.of(experiment, experiment.mesh.open())
    step = program.lower_step(random_batch(experiment, experiment.bare().vocab)).compile()
    state = program.init()
    batch = program.put(random_batch(experiment, experiment.bare().vocab))
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    seconds = []
    for _ in range(warm_up + steps):
        began = time.perf_counter()
        state, metrics = step(state, batch, allow)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    if not np.isfinite(float(metrics["loss"])):
        raise FloatingPointError(f"the loss became {float(metrics['loss'])}: these seconds measure nothing")
    return seconds[warm_up:]


def device_word() -> str:
    """The kind of device as a word for a file name."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")
