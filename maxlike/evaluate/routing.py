"""The held-out loss of a network as it would decode, whatever routing it trains with."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixture_of_depths import MixtureOfDepths
from layers.modality_moe import ModalityMoE
from layers.parts import parts
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.objectives.auxiliary_routers import AuxiliaryRouters
from maxlike.program import Program
from maxlike.tool import Tool

Part = TypeVar("Part", bound=nnx.Module)


class CausalLoss(Tool):
    """Loss on the validation split with every choice made from a token alone; a tool of `measure.Measure`.

    Routing by the best tokens of a batch sees tokens to come, so its loss is too good for a decoder; auxiliary routers
    stand in for it (MoMa, arXiv 2407.21770, section 2.5). Choices that training would drop for want of room
    (ModalityMoE.capacity_bound) are made here.

    Values: causal_loss (nats a token), causal_loss/MODALITY where the objective names modalities; of a network with
    auxiliary routers also top_k_loss, routed as in training, causal_excess = causal_loss / top_k_loss - 1, and
    random_excess, the same where auxiliary routers choose as often but by lot.

    Knobs: seed of the lots, >= 0. Refuses a network that chooses among tokens and has no auxiliary routers.
    """

    def __init__(self, *, seed: int = 0):
        if seed < 0:
            raise UserError(f"CausalLoss.seed={seed} must not be negative")
        self.seed = seed
        self._programs: dict[str, Program] = {}  # a run that differs in its seed alone needs what is compiled here

    def check(self, experiment: Experiment) -> None:
        _refuse_without_auxiliary(experiment.bare())
        experiment.open_validation()

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> dict[str, float]:
        self.check(experiment)
        network = experiment.bare()
        routes: dict[str, Callable[[Any], None]] = {"causal": as_decoded}
        if _has_auxiliary(network):
            routes |= {"top_k": as_trained, "random": lambda model: by_chance(model, self.seed)}
        batches = experiment.open_validation()
        found = {name: self._routed(program, name, route).evaluate(state, batches) for name, route in routes.items()}
        values = {f"causal_{name}": x for name, x in found["causal"].items() if name.partition("/")[0] == "loss"}
        if "top_k" in found:
            values["top_k_loss"] = found["top_k"]["loss"]
            for name in ("causal", "random"):
                values[f"{name}_excess"] = found[name]["loss"] / values["top_k_loss"] - 1
        return values

    def _routed(self, program: Program, name: str, route: Callable[[Any], None]) -> Program:
        """The program with an objective that routes anew."""
        if name not in self._programs or self._programs[name].model is not program.model:
            experiment, objective = program.experiment, program.experiment.objective
            if isinstance(objective, AuxiliaryRouters):
                objective = objective.next_token
            experiment = dataclasses.replace(experiment, objective=_Routed(objective, route))
            self._programs[name] = dataclasses.replace(program, experiment=experiment)
        return self._programs[name]


@dataclasses.dataclass(frozen=True)
class _Routed:
    """An objective whose model is routed anew before it is called."""

    objective: Callable
    route: Callable[[Any], None]

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None):
        self.route(model)  # the model is this call's own, merged from its parameters
        return self.objective(model, batch, key)


class Lots(nnx.Module):
    """Stands where an auxiliary router stands and draws lots: positive for the share `share` of its choices, which
    depend on `seed` and the whole input."""

    def __init__(self, share: float, outputs: int | None, seed: int):
        self.share, self.outputs, self.seed = share, outputs, seed

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[:-1] if self.outputs is None else (*x.shape[:-1], self.outputs)
        number = jax.lax.bitcast_convert_type(jnp.sum(x, dtype=jnp.float32), jnp.uint32)
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        return jnp.where(jax.random.bernoulli(key, self.share, shape), 1.0, -1.0)


def as_decoded(model: Any) -> None:
    """Evaluates by auxiliary routers where there are some."""
    for layer in parts(model, ModalityMoE):
        layer.evaluation = "auxiliary" if any(group.count > 1 for group in layer.groups) else "top_k"
    for layer in parts(model, MixtureOfDepths):
        layer.evaluation = "auxiliary"
    _make_room(model)


def as_trained(model: Any) -> None:
    """Evaluates by the best tokens of each routing scope."""
    for layer in (*parts(model, ModalityMoE), *parts(model, MixtureOfDepths)):
        layer.evaluation = "top_k"
    _make_room(model)


def by_chance(model: Any, seed: int) -> None:
    """As decoded, with lots for auxiliary routers."""
    as_decoded(model)
    for layer in parts(model, ModalityMoE):
        for group in layer.groups:
            if group.count > 1:
                group.auxiliary = Lots(group.share, group.count, seed)
    for layer in parts(model, MixtureOfDepths):
        layer.auxiliary = Lots(layer.capacity, None, seed)


def _make_room(model: Any) -> None:
    for layer in parts(model, ModalityMoE):
        for group in layer.groups:
            group.bound = 1.0


def _has_auxiliary(network: Any) -> bool:
    depths = any(layer.auxiliary is not None for layer in parts(network, MixtureOfDepths))
    return depths or any(group.auxiliary is not None for moe in parts(network, ModalityMoE) for group in moe.groups)


def _refuse_without_auxiliary(network: Any) -> None:
    for layer in parts(network, ModalityMoE):
        if not layer.causal:
            raise UserError("CausalLoss: ModalityMoE.auxiliary is None, so the network has no causal loss; bind it")
    for layer in parts(network, MixtureOfDepths):
        if layer.auxiliary is None:
            raise UserError("CausalLoss: MixtureOfDepths.auxiliary is None, so the network has no causal loss; bind it")
