"""Weights as they are used after training: what `layers.merging` can merge is merged.

An export writes them, and `Merged` lets tools measure them, so that what is measured is what would be served.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from layers import merging
from layers.axes import Buffer
from maxlike.experiment import Experiment
from maxlike.measure import Measure, Values
from maxlike.program import Program
from maxlike.tool import Tool


def plain(experiment: Experiment) -> Experiment:
    """The experiment of the merged network; the same one where nothing merges."""
    model = experiment.model

    @functools.wraps(model)
    def factory(*, rngs: nnx.Rngs) -> Any:
        return merging.merged(model(rngs=rngs))

    merged = dataclasses.replace(experiment, model=factory)
    before, after = experiment.abstract_model().params, merged.abstract_model().params
    same = jax.tree.structure(before) == jax.tree.structure(after)
    unchanged = same and all(a.shape == b.shape for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)))
    return experiment if unchanged else merged


def weights(experiment: Experiment, params: dict, buffers: dict) -> tuple[dict, dict]:
    """(parameters, buffers) of the network of `plain(experiment)`, from those of the experiment's own. Products are in
    float64 and rounded once; in float32 where this is traced."""
    network = merging.merged(experiment.abstract_model().merge(params, buffers))
    _, params, buffers = nnx.split(network, nnx.Param, Buffer)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


@dataclasses.dataclass(frozen=True)
class _Made:
    """A program, what became of it, and the compiled function that merges its (parameters, buffers)."""

    source: Program
    merged: Program
    merge: Callable

    @classmethod
    def of(cls, source: Program) -> "_Made":
        merged = Program.of(plain(source.experiment), source.layout)
        shardings = merged.shardings["params"], merged.shardings["buffers"]
        return cls(source, merged, jax.jit(functools.partial(weights, source.experiment), out_shardings=shardings))

    def serves(self, program: Program, experiment: Experiment) -> bool:
        """Whether it is of that program, or of one that differs in its beginning alone."""
        return self.source.layout is program.layout and self.source.serves(experiment)


class Merged(Tool):
    """Lets tools measure the merged weights (`Measure.tools`): each is called as it would be without this one, with the
    experiment, program and state of the merged network. The state has no optimizer's part.

    tools: as of Measure.
    """

    def __init__(self, *, tools: tuple[Callable, ...]):
        self._measure = Measure(tools=tools)
        self._made: _Made | None = None

    def check(self, experiment: Experiment) -> None:
        self._measure.check(plain(experiment))

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> Values:
        if not (self._made and self._made.serves(program, experiment)):
            self._made = _Made.of(program)
        if self._made.merged.experiment.model is experiment.model:
            return self._measure.measured(program, state)
        merge, buffers = self._made.merge, state["buffers"]
        merged = self._made.merged.experiment.rerun(seed=experiment.seed, warm_start=experiment.warm_start)
        after = {name: state[name] for name in ("step", "seed", "guard")}
        after["params"], after["buffers"] = merge(state["params"], buffers)
        if "ema" in state:
            after["ema"] = merge(state["ema"], buffers)[0]
        return self._measure.measured(self._made.merged.rerun(merged), after)
