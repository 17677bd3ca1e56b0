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
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.program import Program


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


class Merged:
    """Lets tools measure the merged weights (`Measure.tools`): each is called as it would be without this one, with the
    experiment, program and state of the merged network. The state has no optimizer's part.

    tools: at least one. Raises UserError for none, and where two tools report one name.
    """

    def __init__(self, *, tools: tuple[Callable, ...]):
        if not tools:
            raise UserError("Merged.tools is empty: name at least one tool")
        self.tools = tuple(tools)

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> dict[str, float]:
        merged = plain(experiment)
        if merged is not experiment:
            program, state = self._merge(experiment, merged, program, state)
        values: dict[str, float] = {}
        for tool in self.tools:
            found = tool(merged, program, state)
            if twice := sorted(values.keys() & found):
                raise UserError(f"two of Merged.tools report {twice[0]!r}: drop one, or give them different knobs")
            values |= found
        return values

    def _merge(self, experiment: Experiment, merged: Experiment, before: Program, state: dict) -> tuple[Program, dict]:
        program = Program.of(merged, before.layout)
        sharding = program.shardings
        merge = jax.jit(functools.partial(weights, experiment), out_shardings=(sharding["params"], sharding["buffers"]))
        kept = {name: state[name] for name in ("step", "seed", "guard")}
        kept["params"], kept["buffers"] = merge(state["params"], state["buffers"])
        if "ema" in state:
            kept["ema"] = merge(state["ema"], state["buffers"])[0]
        return program, kept
