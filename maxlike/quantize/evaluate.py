"""What a recipe costs: the same batches with and without it."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np

from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.program import Program
from maxlike.quantize.activations import FakeQuantized
from maxlike.quantize.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Cost:
    """before, after: metrics over the same batches. rise: of the loss, nats a token (QiD of arXiv 2411.17691).
    standard_error: of that rise, from the differences of the batches; None from fewer than two. tokens: predicted."""

    before: dict[str, float]
    after: dict[str, float]
    rise: float
    standard_error: float | None
    tokens: int


class Evaluator:
    """A program's validation batches through its network, plain and with a recipe's activations and cache."""

    def __init__(self, program: Program, recipe: Recipe):
        self.program, self.recipe = program, recipe
        objective = program.experiment.objective
        self._plain = self._compiled(objective)
        bare = recipe.activations == recipe.cache == 16
        self._quantized = self._plain if bare else self._compiled(FakeQuantized(objective, recipe))

    def __call__(self, state: dict, params: dict, batches: int | None = None) -> Cost:
        """Metrics of the state's parameters (the averaged ones where it has them) and of quantized `params`, over the
        first `batches` of the validation split, None for all. Raises UserError for an empty split."""
        original = state["ema"] if "ema" in state else state["params"]
        found: list[tuple[dict[str, Mean], dict[str, Mean]]] = []
        part, parts = self.program.feed
        split = self.program.experiment.open_validation()
        for batch in itertools.islice(split.iterate(host=part, hosts=parts), batches):
            placed = self.program.put(batch)
            plain = self._plain(original, state["buffers"], placed)
            found.append(jax.device_get((plain, self._quantized(params, state["buffers"], placed))))
        if not found:
            raise UserError("the validation split has no batch: there is nothing to evaluate quantization on")
        before, after = (_values([pair[i] for pair in found]) for i in range(2))
        losses = np.array([[float(means["loss"].value()) for means in pair] for pair in found])
        weights = np.array([float(pair[0]["loss"].weight) for pair in found])
        error = _standard_error(losses[:, 1] - losses[:, 0], weights)
        return Cost(before, after, after["loss"] - before["loss"], error, int(weights.sum()))

    def serves(self, program: Program) -> bool:
        """Whether what is compiled here is that program's too."""
        return self.program.model is program.model and self.program.layout is program.layout

    def _compiled(self, objective: Any) -> Any:
        program, step = self.program, self.program.experiment.step

        def evaluate(params: dict, buffers: dict, batch: dict) -> dict[str, Mean]:
            with program.placed():
                return step.loss(params, buffers, batch, None, program.model, objective)[1]

        return jax.jit(evaluate, out_shardings=program.layout.replicated)


def _values(found: list[dict[str, Mean]]) -> dict[str, float]:
    """Numbers of the summed metrics."""
    totals = {name: sum((means[name] for means in found[1:]), found[0][name]) for name in found[0]}
    return {name: float(mean.value()) for name, mean in totals.items() if not np.ndim(mean.total)}


def _standard_error(differences: np.ndarray, weights: np.ndarray) -> float | None:
    """Of the weighted mean of the batches' differences."""
    if len(differences) < 2:
        return None
    shares = weights / weights.sum()
    spread = np.sum((shares * (differences - np.sum(shares * differences))) ** 2)
    return math.sqrt(spread * len(differences) / (len(differences) - 1))
