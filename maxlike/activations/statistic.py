"""Statistic: a number about the activations of a network, over rows of the validation split."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from layers import taps
from layers.language_model import LanguageModel
from layers.mixture_of_depths import MixtureOfDepths
from layers.parts import parts
from layers.stack import lay_bare
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.metrics import Mean
from maxlike.objectives.batch import context_of
from maxlike.program import Program
from maxlike.tool import Tool

Batch = dict[str, jax.Array]
Values = dict[str, float | list[float]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["top"], meta_fields=[])
@dataclasses.dataclass
class Peak:
    """A maximum; of two, the larger is the sum."""

    top: jax.Array

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(jnp.maximum(self.top, other.top))

    def value(self) -> jax.Array:
        return self.top


Sums = dict[str, Mean | Peak]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one pass over a batch [B, T] showed, while it is traced.

    batch: its fields. real_BT: bool, the tokens that count: neither padding nor beyond the rows asked for.
    hidden_BTD: output of the network behind its final norm. tapped: for each name of `layers.taps` that was asked for,
    (x, owner) in the order of the computation: shallow layers first.
    """

    batch: Batch
    real_BT: jax.Array
    hidden_BTD: jax.Array
    tapped: dict[str, list[tuple[jax.Array, Any]]]

    def mean(self, x_BT: jax.Array) -> Mean:
        """Of a number a token, over the tokens that count."""
        return self.mean_where(x_BT, self.real_BT)

    def mean_where(self, x_BT: jax.Array, here_BT: jax.Array) -> Mean:
        """Of a number a token, over those tokens."""
        here_BT = jnp.broadcast_to(here_BT, x_BT.shape)
        return Mean(jnp.sum(jnp.where(here_BT, x_BT, 0.0)), jnp.sum(here_BT.astype(jnp.float32)))


class Statistic(Tool, abc.ABC):
    """Base of the statistics: tools for `maxlike.measure.Measure`, called as `statistic(experiment, program, state)`.

    rows: how many rows of the validation split, from its beginning, >= 1; a split that has fewer gives all it has.
    A subclass says which `taps` it reads, turns what one batch showed into `sums` (traced; those of batches add up),
    and these into `values`.
    """

    taps: ClassVar[tuple[str, ...]] = ()
    inside_blocks: ClassVar[bool] = False  # whether it must know which tokens a part of a block worked on
    context: Literal["full", "single_token"] = "full"

    def __init__(self, *, rows: int = 32):
        if rows < 1:
            raise UserError(f"{type(self).__name__}.rows={rows}: give a number of rows of at least 1")
        self.rows = rows

    def check(self, experiment: Experiment) -> None:
        """Raises UserError where the experiment's network has not what this statistic is about, or no held-out text."""
        network, name = experiment.bare(), type(self).__name__
        if not isinstance(network, LanguageModel):
            raise UserError(
                f"{name} reads the layers of a LanguageModel, not of a {type(network).__name__}: leave it out"
            )
        if self.inside_blocks and parts(network, MixtureOfDepths):
            raise UserError(
                f"{name} cannot tell which tokens the block of a MixtureOfDepths worked on: leave {name} out"
            )
        experiment.open_validation()

    @abc.abstractmethod
    def sums(self, seen: Seen) -> Sums:
        """What one batch adds, by name; a vector has an entry for each layer."""

    @abc.abstractmethod
    def values(self, totals: dict[str, np.ndarray]) -> Values:
        """What is reported, of the values of the sums."""

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> Values:
        return Passes((self,))(experiment, program, state)


def by_layer(found: list[Mean]) -> Mean:
    """Means of the layers as one of vectors."""
    return Mean(jnp.stack([mean.total for mean in found]), jnp.stack([mean.weight for mean in found]))


def layered(name: str, values_L: np.ndarray) -> Values:
    """The mean over layers under `name`, and each of them, shallow first, under `name/each`."""
    return {name: float(np.mean(values_L)), f"{name}/each": [float(x) for x in values_L]}


class Passes:
    """Several statistics, called as one. Those of the same rows share a pass over them, which is compiled once and kept
    for further runs of the same program (`Program.rerun`)."""

    def __init__(self, statistics: tuple[Statistic, ...]):
        kinds = dict.fromkeys((statistic.rows, statistic.context) for statistic in statistics)
        self._groups = [tuple(s for s in statistics if (s.rows, s.context) == kind) for kind in kinds]
        self._of: Program | None = None
        self._compiled: list[Callable] = []

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> Values:
        """What they find. state: as a Program makes it; averaged parameters are used where it has them. Raises
        UserError where a statistic does not fit the network, or two give one name."""
        if self._of is None or self._of.model is not program.model or self._of.layout is not program.layout:
            for group in self._groups:
                for statistic in group:
                    statistic.check(experiment)
            looks = (functools.partial(_look, group, program) for group in self._groups)
            self._compiled = [jax.jit(look, out_shardings=program.layout.replicated) for look in looks]
            self._of = program
        values: Values = {}
        for group, look in zip(self._groups, self._compiled):
            for statistic, totals in zip(group, _totals(look, group[0].rows, experiment, program, state)):
                found = statistic.values(totals)
                twice = sorted(found.keys() & values.keys())
                if twice:
                    raise UserError(f"two statistics give {twice[0]!r}: keep one {type(statistic).__name__}")
                values |= found
        return values


def _totals(look: Callable, rows: int, experiment: Experiment, program: Program, state: dict) -> list[dict]:
    """The totals of each statistic of a group, over its rows."""
    batches, (part, parts) = experiment.open_validation(), program.feed
    params = state["ema"] if "ema" in state else state["params"]
    sums: list[Sums] | None = None
    needed = -(-rows // batches.batch_size)
    for number, batch in enumerate(itertools.islice(batches.iterate(host=part, hosts=parts), needed)):
        left = jnp.asarray(rows - number * batches.batch_size, jnp.int32)
        new = look(params, state["buffers"], program.put(batch), left)
        sums = new if sums is None else [{name: a[name] + b[name] for name in a} for a, b in zip(sums, new)]
    return [{name: np.asarray(x.value()) for name, x in jax.device_get(one).items()} for one in sums]


def _look(
    group: tuple[Statistic, ...], program: Program, params: dict, buffers: dict, batch: Batch, left
) -> list[Sums]:
    """What the group sums over the first `left` rows of a batch."""
    with program.placed():
        cast = program.model.cast(params, jnp.dtype(program.experiment.step.compute_dtype))
        network = lay_bare(program.model.merge(cast, buffers))
        batch, real_BT = _tokens(batch, left, alone=group[0].context == "single_token")
        tapped = {name: [] for statistic in group for name in statistic.taps}

        def observer(name: str):
            def observe(x: jax.Array, owner: Any) -> jax.Array:
                tapped[name].append((x, owner))
                return x

            return observe

        with taps.opened({name: observer(name) for name in tapped}):
            output = network(batch["inputs"], context_of(batch, None))
        seen = Seen(batch, real_BT, output.hidden_BTD, tapped)
        return [statistic.sums(seen) for statistic in group]


def _tokens(batch: Batch, left: jax.Array, *, alone: bool) -> tuple[Batch, jax.Array]:
    """(batch, which of its tokens count); alone: each of them as a row of its own, at position 0."""
    segments_BT = batch["segment_ids"]
    real_BT = (segments_BT != 0) & (jnp.arange(segments_BT.shape[0])[:, None] < left)
    if not alone:
        return batch, real_BT
    column = {name: jnp.reshape(batch[name], (-1, 1)) for name in ("inputs", "segment_ids")}
    return column | {"positions": jnp.zeros_like(column["inputs"])}, jnp.reshape(real_BT, (-1, 1))
