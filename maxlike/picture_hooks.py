"""Hooks of experiments with pictures."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from maxlike.errors import UserError
from maxlike.hooks import Hook
from maxlike.objectives.reconstruction import to_pixels
from maxlike.report.picture_grid import grid, to_uint8

if TYPE_CHECKING:
    from maxlike.train import Training


class Reconstructions(Hook):
    """Writes `reconstructions.png` into the run: held-out pictures, each above what the tokenizer makes of it, every
    `every` steps and after the last one.

    count: pictures, at most a validation batch; columns: in a row. Needs `Pictures.validation`.
    """

    def __init__(self, *, every: int = 500, count: int = 32, columns: int = 16):
        if every < 1 or count < 1 or columns < 1:
            raise UserError(f"Reconstructions.every={every}, count={count}, columns={columns}: each must be at least 1")
        self.every, self.count, self.columns = every, count, columns

    def open(self, training: "Training") -> None:
        self.training = training
        batch = training.experiment.open_validation().batch(0)
        self.pictures = batch["pictures"][batch["loss_weights"] > 0][: self.count]
        graph = training.program.model.graph
        self.reconstruct = jax.jit(lambda p, b, x: nnx.merge(graph, p, b)(to_pixels(x)).pixels_BSSC)

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step % self.every and step != self.training.experiment.steps:
            return
        self.training.log.flush()
        params = self.training.program.trained(state)
        decoded = to_uint8(jax.device_get(self.reconstruct(params, state["buffers"], self.pictures)))
        if jax.process_index() == 0:
            path = self.training.run.file("reconstructions.png")
            path.write_bytes(grid(in_pairs(self.pictures, decoded, self.columns)))


def in_pairs(above: np.ndarray, below: np.ndarray, columns: int) -> list[np.ndarray]:
    """Rows of `columns` pictures, each followed by the row of their counterparts."""
    rows = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
    return rows
