"""QuantizedLoss: what few bits cost a network when it is trained."""

import jax

from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.program import Program
from maxlike.quantize import targets
from maxlike.quantize.calibrate import Calibration
from maxlike.quantize.evaluate import Evaluator
from maxlike.quantize.recipe import Method, Recipe
from maxlike.quantize.weights import quantize
from maxlike.tool import Tool


class QuantizedLoss(Tool):
    """A tool for `maxlike.measure.Measure`: the validation loss with quantized weights, activations and cache.

    It reports `loss_w4a4kv4`, nats a token, and `loss_rise_w4a4kv4`, its rise as a share of the loss of the same
    batches in 16 bits; with the bits that were asked for, and the method behind them unless it is RTN
    (`loss_w4a4kv4_had`).

    weights, activations, cache: bits, 2, 3, 4, 6, 8 or 16. method: "rtn", "had" (with a Hadamard rotation at each
        feed-forward's down projection), "gptq", "quarot", ...: see Recipe.
    batches: of the validation split, >= 1. rows: of the training split that GPTQ collects Hessians over.
    hadamard_blocks: where the feed-forward's width has no Hadamard matrix, rotate blocks of it.
    """

    def __init__(
        self,
        *,
        weights: int = 4,
        activations: int = 4,
        cache: int = 4,
        method: Method = "rtn",
        batches: int = 4,
        rows: int = 32,
        hadamard_blocks: bool = False,
    ):
        for name, value in (("batches", batches), ("rows", rows)):
            if value < 1:
                raise UserError(f"QuantizedLoss.{name}={value} must be at least 1")
        bits = {"weights": weights, "activations": activations, "cache": cache}
        self.recipe = Recipe(**bits, method=method, hadamard_blocks=hadamard_blocks)
        self.batches, self.rows = batches, rows
        self._evaluator: Evaluator | None = None

    def check(self, experiment: Experiment) -> None:
        targets.find(experiment.bare(), self.recipe)
        if self.recipe.needs_hessian and jax.process_count() > 1:
            raise UserError(f"QuantizedLoss.method={self.recipe.method!r} runs as one process: use rtn, had or quarot")

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> dict[str, float]:
        if self._evaluator is None or not self._evaluator.serves(program):
            self._evaluator = Evaluator(program, self.recipe)
        params = state["ema"] if "ema" in state else state["params"]
        calibration = Calibration.of(experiment, self.rows) if self.recipe.needs_hessian else None
        weights = quantize(experiment, params, state["buffers"], self.recipe, calibration)
        cost = self._evaluator(state, weights.params, self.batches)
        name = self.recipe.name
        return {f"loss_{name}": cost.after["loss"], f"loss_rise_{name}": cost.rise / cost.before["loss"]}
