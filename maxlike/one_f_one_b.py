"""The pipeline schedule "one forward, one backward", with a backward pass of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layers import axes, kernels
from layers.language_model import LanguageModel, Output
from layers.micro_batches import check_rows, cut_rows, split_key
from layers.pipeline import bubble, describe, stage_axes
from layers.stack import by_depth
from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.model import AbstractModel
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.next_token import NextToken

Tree = Any


class OneFOneB:
    """Loss and gradients of a language model whose layers lie on stages, one backward pass for each forward pass
    (PipeDream-flush, Narayanan et al. 2021, arXiv 2006.09503; Megatron-LM's 1F1B).

    The forward pass of micro-batch m on stage s of S is at tick m + s, its backward pass at tick m + 2 (S - 1) - s, on
    the last stage the same. A stage keeps the inputs of the 2 S - 1 micro-batches that can be under way, whatever their
    number, and computes its forward pass anew for the backward pass; no loop is differentiated. The first stage embeds,
    and runs Stack.prefix; the last runs Stack.suffix and has the head and the loss. Devices go through the ticks
    together: there are M + S - 1 with a forward pass and as many with a backward pass, and every stage takes as long
    as the slowest, so that the head and the embedding cost their time in each tick.

    It is the sum over the micro-batches that `Step.micro_batches` = M gives, each example in some micro-batch: losses
    of layers, too, are weighted by a micro-batch's tokens. Gradients are summed in float32.

    micro_batches: M >= 1; with a multiple of S a bubble of (S - 1) / (M + S - 1).

    Raises UserError for another objective than NextToken, another network than LanguageModel and one with further
    prediction modules: it does not know how to take them apart; ValueError for a mesh without stages and M that does
    not divide the rows.
    """

    def __init__(self, *, micro_batches: int):
        if micro_batches < 1:
            raise UserError(f"OneFOneB.micro_batches={micro_batches}: it must be at least 1")
        self.micro_batches = micro_batches

    def __call__(
        self, params: dict, buffers: dict, batch: dict, key: jax.Array, model: AbstractModel, objective: NextToken
    ) -> tuple[Mean, dict[str, Mean], dict, dict]:
        """(loss, metrics, float32 gradients by `params`, statistics of `buffers`), sums over the batch but for the
        statistics, which are means over the micro-batches.

        params: in the compute dtype. batch: [B, T] fields. key: of the step's randomness.
        """
        self._check(model.merge(params, buffers), objective)
        over = stage_axes("OneFOneB")
        check_rows("OneFOneB.micro_batches", self.micro_batches, batch["inputs"].shape[0])
        layers, rest = _apart({"params": params, "buffers": buffers})

        def stage(layers: Tree, rest: Tree, batch: dict, keys: jax.Array) -> tuple:
            micro = {name: cut_rows(x, over, self.micro_batches) for name, x in batch.items()}
            return _Stage(model, objective, over, self.micro_batches, micro, keys).run(layers, rest)

        sums, before, middle, after, of_layers, of_rest = axes.shard_map(
            stage,
            over=over,
            inputs=(("layers",), (), ("batch",), ()),
            outputs=((), (), ("layers",), (), ("layers",), ()),
            check=False,
        )(layers, rest, batch, split_key(key, self.micro_batches))
        loss, metrics = sums
        losses, reported = read_aux(by_depth(before, middle, after), loss.weight)
        gradients = _together(of_layers, of_rest)
        return Mean(loss.total + losses, loss.weight), metrics | reported, gradients["params"], gradients["buffers"]

    def _check(self, network: Any, objective: Any) -> None:
        if not isinstance(network, LanguageModel):
            raise UserError(
                f"Step.gradients=OneFOneB cannot take a {type(network).__name__} apart, only a LanguageModel: "
                "leave it None and bind Stack.pipeline"
            )
        if network.mtp is not None:
            raise UserError(
                "Step.gradients=OneFOneB cannot take LanguageModel.mtp apart: leave one of the two None (the pipeline "
                "of Stack.pipeline runs with both)"
            )
        if type(objective) is not NextToken:
            raise UserError(
                f"Step.gradients=OneFOneB computes the gradients of NextToken, not of {type(objective).__name__}: "
                "leave it None and bind Stack.pipeline"
            )
        objective.check(network)


def _apart(tree: Tree) -> tuple[Tree, Tree]:
    """{kind: pure dict} -> the same of the layers on stages, and of all the rest."""
    layers, rest = {}, {}
    for kind, values in tree.items():
        stack = dict(values.get("stack", {}))
        layers[kind] = stack.pop("periods", {})
        rest[kind] = {name: value for name, value in values.items() if name != "stack"} | (
            {"stack": stack} if stack else {}
        )
    return layers, rest


def _together(layers: Tree, rest: Tree) -> Tree:
    """The inverse of `_apart`."""
    whole = dict(rest)
    for kind, periods in layers.items():
        if periods:
            whole[kind] = rest[kind] | {"stack": rest[kind].get("stack", {}) | {"periods": periods}}
    return whole


def _gather_tables(params: dict, axes_of: dict) -> dict:
    """Tables and heads cut along tokens or positions alone: gathered once, not for every chunk of logits and tick.
    (And XLA's partitioner fails on a look-up in a table that is cut both ways inside a shard_map.)"""
    tables = ("vocab", "positions")

    def gather(p: jax.Array, names: tuple[str, ...]) -> jax.Array:
        if not set(names) & {*tables}:
            return p
        return axes.constrain(p, *(name if name in tables else None for name in names))

    return {
        name: _gather_tables(value, axes_of[name]) if isinstance(value, dict) else gather(value, axes_of[name])
        for name, value in params.items()
    }


@dataclasses.dataclass
class _Stage:
    """One stage's work on the micro-batches. `layers`, `rest`: {"params", "buffers"} of the layers of this stage, and
    of what first and last stage have besides, whose numbers every stage has."""

    model: AbstractModel
    objective: NextToken
    over: tuple[str, ...]
    micro_batches: int
    batch: dict[str, jax.Array]  # [M, B / M, T]
    keys: jax.Array  # [M]

    def _part(self, m: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        """(batch, context) of micro-batch m."""
        part = {name: x[m] for name, x in self.batch.items()}
        return part, context_of(part, self.keys[m])

    def _network(self, layers: Tree, rest: Tree) -> LanguageModel:
        whole = _together(layers, rest)
        return self.model.merge(whole["params"], whole["buffers"])

    def _losses(self, m: jax.Array, *values: tuple) -> jax.Array:
        """What layers add to the loss of micro-batch m."""
        return read_aux(by_depth(*values), self._tokens(m))[0]

    def _tokens(self, m: jax.Array) -> jax.Array:
        return jnp.sum(self.batch["loss_weights"][m].astype(jnp.float32))

    def enter(self, rest: Tree, layers: Tree, m: jax.Array) -> tuple:
        """((what the layers on stages begin with, losses), reports)."""
        network, (part, ctx) = self._network(layers, rest), self._part(m)
        ctx = network.context(part["inputs"], ctx)
        x_BTD, values = network.stack.enter(network.enter(part["inputs"], ctx), ctx)
        return (x_BTD, self._losses(m, values, (), ())), values

    def pass_on(self, layers: Tree, x_BTD: jax.Array, rest: Tree, m: jax.Array) -> tuple:
        """((what the next stage begins with, losses), reports)."""
        network, (part, ctx) = self._network(layers, rest), self._part(m)
        stack, ctx = network.stack, network.context(part["inputs"], ctx)
        first = jax.lax.axis_index(self.over) * jax.tree.leaves(layers)[0].shape[0]
        y_BTD, values = stack.run_periods(stack.periods, x_BTD, ctx, first)
        return (y_BTD, self._losses(m, (), values, ())), values

    def leave(self, rest: Tree, x_BTD: jax.Array, layers: Tree, m: jax.Array) -> tuple:
        """(total loss, ((loss, metrics) without those of layers, reports))."""
        network, (part, ctx) = self._network(layers, rest), self._part(m)
        x_BTD, values = network.stack.leave(x_BTD, network.context(part["inputs"], ctx))
        loss, metrics = self.objective.score(network, part, Output(network.leave(x_BTD), {}))
        return loss.total + self._losses(m, (), (), values), ((loss, metrics), values)

    def run(self, layers: Tree, rest: Tree) -> tuple:
        """All ticks. (sums of the last stage, reports of the blocks before, on and behind the stages as means weighted
        by tokens, gradients of layers and rest)."""
        over, M = self.over, self.micro_batches
        S, stage = jax.lax.axis_size(over), jax.lax.axis_index(over)
        kernels.take("pipeline", "1f1b", describe(S, M, 1, bubble("1f1b", S, M)))
        rest = rest | {"params": _gather_tables(rest["params"], self.model.axes)}
        slots = 2 * S - 1
        first, last = stage == 0, stage == S - 1

        def forward(carry: dict, t: jax.Array) -> tuple[dict, jax.Array]:
            m = jnp.clip(t - stage, 0, M - 1)
            x_BTD = jnp.where(first, self.enter(rest, layers, m)[0][0], carry["x"])
            kept = carry["kept"].at[(t - stage) % slots].set(x_BTD)
            (y_BTD, _), _ = self.pass_on(layers, x_BTD, rest, m)
            x_BTD = jax.lax.ppermute(y_BTD, over, [(s, (s + 1) % S) for s in range(S)])
            return carry | {"x": x_BTD, "kept": kept}, y_BTD

        def backward(carry: dict, t: jax.Array, dy_BTD: jax.Array) -> tuple[dict, tuple]:
            at = t - 2 * (S - 1) + stage
            m = jnp.clip(at, 0, M - 1)
            real, one = at == m, jnp.ones((), jnp.float32)
            x_BTD = carry["kept"][at % slots]
            _, pull, values = jax.vjp(lambda w, x: self.pass_on(w, x, rest, m), layers, x_BTD, has_aux=True)
            of_layers, dx_BTD = pull((dy_BTD, one))
            _, pull, before = jax.vjp(lambda w: self.enter(w, layers, m), rest, has_aux=True)
            (of_rest,) = pull((dx_BTD, one))
            dx_BTD = jax.lax.ppermute(dx_BTD, over, [(s, (s - 1) % S) for s in range(S)])
            carry = carry | {
                "dx": dx_BTD,
                "layers": self._add(carry["layers"], of_layers, real),
                "rest": self._add(carry["rest"], of_rest, real & first),
            }
            return carry, (before, values)

        def both(carry: dict, t: jax.Array) -> tuple[dict, tuple]:
            carry, y_BTD = forward(carry, t)
            m = t - (S - 1)
            _, pull, sums = jax.vjp(lambda w, x: self.leave(w, x, layers, m), rest, y_BTD, has_aux=True)
            of_rest, dy_BTD = pull(jnp.ones((), jnp.float32))
            carry = carry | {"rest": self._add(carry["rest"], of_rest, last)}
            carry, values = backward(carry, t, jnp.where(last, dy_BTD, carry["dx"]))
            return carry, (values, sums)

        carry = self._begin(layers, rest, slots)
        carry, _ = jax.lax.scan(lambda c, t: (forward(c, t)[0], None), carry, jnp.arange(S - 1))
        carry, (values, sums) = jax.lax.scan(both, carry, jnp.arange(S - 1, M + S - 1))
        carry, more = jax.lax.scan(lambda c, t: backward(c, t, c["dx"]), carry, M + S - 1 + jnp.arange(S - 1))

        # The ticks in which this stage's backward passes were real are in a row.
        def real(*parts: jax.Array) -> jax.Array:
            return self._mean(jax.lax.dynamic_slice_in_dim(jnp.concatenate(parts), S - 1 - stage, M))

        before, middle = jax.tree.map(real, values, more)
        sums, after = sums
        sums, after = jax.tree.map(lambda v: jnp.sum(v, 0), sums), jax.tree.map(self._mean, after)
        whole = (self._only(last, sums), self._only(first, before), middle, self._only(last, after))
        of_rest = jax.tree.map(lambda g: jax.lax.psum(g, over), carry["rest"])
        return *whole, self._statistics(carry["layers"]), self._statistics(of_rest)

    def _begin(self, layers: Tree, rest: Tree, slots: int) -> dict:
        x = jax.eval_shape(lambda: self.enter(rest, layers, jnp.zeros((), jnp.int32))[0][0])
        zero_BTD = jnp.zeros(x.shape, x.dtype)

        def zeros(tree: Tree) -> Tree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), tree)

        kept = jnp.zeros((slots, *x.shape), x.dtype)
        return {"x": zero_BTD, "dx": zero_BTD, "kept": kept, "layers": zeros(layers), "rest": zeros(rest)}

    def _add(self, sums: Tree, gradients: Tree, real: jax.Array) -> Tree:
        """Adds in float32 what is real: a stage without a micro-batch computes on one that is not its own."""
        return jax.tree.map(lambda total, g: total + jnp.where(real, g.astype(jnp.float32), 0.0), sums, gradients)

    def _mean(self, v: jax.Array) -> jax.Array:
        """[M, ...] -> mean over the micro-batches, weighted by their tokens."""
        tokens_M = jax.vmap(self._tokens)(jnp.arange(self.micro_batches))
        share_M = tokens_M / jnp.maximum(jnp.sum(tokens_M), 1e-9)
        return jnp.tensordot(share_M, v.astype(jnp.float32), 1)

    def _only(self, here: jax.Array, tree: Tree) -> Tree:
        """The values of the one stage for which `here` holds, on all of them."""
        return jax.tree.map(lambda v: jax.lax.psum(jnp.where(here, v, jnp.zeros_like(v)), self.over), tree)

    def _statistics(self, gradients: Tree) -> Tree:
        """What buffers measured, as the mean over the micro-batches instead of their sum."""
        return gradients | {"buffers": jax.tree.map(lambda s: s / self.micro_batches, gradients["buffers"])}
