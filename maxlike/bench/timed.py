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


class Steps:
    """The compiled training step of an experiment with its state, on random tokens, after `warm_up` calls; each call is
    one step and gives its seconds.

    compiled: the step. After the last call `check` refuses a loss that is not finite.
    """

    def __init__(self, experiment: Experiment, warm_up: int = 2):
        program = Program.of(experiment, experiment.mesh.open())
        batch = random_batch(experiment, experiment.bare().vocab)
        self.compiled = program.lower_step(batch).compile()
        self._state, self._batch = program.init(), program.put(batch)
        self._allow = jax.device_put(np.bool_(True), program.layout.replicated)
        self._metrics: dict[str, jax.Array] = {}
        for _ in range(warm_up):
            self()

    def __call__(self) -> float:
        began = time.perf_counter()
        self._state, self._metrics = self.compiled(self._state, self._batch, self._allow)
        jax.block_until_ready((self._state, self._metrics))
        return time.perf_counter() - began

    def check(self) -> None:
        loss = float(self._metrics["loss"])
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss}: these seconds measure nothing")


def step_seconds(experiment: Experiment, steps: int) -> list[float]:
    """Seconds of each of `steps` training steps, each waited for."""
    run = Steps(experiment)
    seconds = [run() for _ in range(steps)]
    run.check()
    return seconds


def device_word() -> str:
    """The kind of device as a word for a file name."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")
