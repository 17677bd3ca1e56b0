"""Pipeline parallel: the layers of a stack spread over stages, micro-batches passed from stage to stage.

Stages are the devices along the mesh axis on which the logical axis "layers" lies. Everything here is manual over that
axis alone; how a stage spreads its own work over other mesh axes stays with the compiler. Outside the pipeline the
stages share the rows of the batch among them, so that embedding and head are computed once and not once a stage.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels
from layers.block import RESIDUAL
from layers.context import Context
from layers.micro_batches import Rows, cut_rows, join_rows

SCHEDULES = ("circular", "1f1b")


def bubble(schedule: Literal["circular", "1f1b"], stages: int, micro_batches: int, repeats: int = 1) -> float:
    """The share of a step's time, 0 to 1, in which a stage waits: (S - 1) / (M R + S - 1).

    stages S, micro_batches M, repeats R, all >= 1; with repeats each stage holds R runs of layers far from each other,
    for which M must be at least S. "1f1b" (one forward, one backward) has the bubble of "circular" and no repeats; what
    it saves is memory.

    Raises ValueError for another schedule and counts that it does not run with.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"no pipeline schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    for name, value in (("stages", stages), ("micro_batches", micro_batches), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"a pipeline of {name}={value}: it must be at least 1")
    if repeats > 1 and schedule == "1f1b":
        raise ValueError(f"repeats={repeats}: the schedule '1f1b' runs through the stages once; take 'circular'")
    if repeats > 1 and micro_batches < stages:
        raise ValueError(
            f"micro_batches={micro_batches} is less than the {stages} stages: with repeats={repeats} a micro-batch "
            "would come round before its stage is free; raise it, or set repeats to 1"
        )
    return (stages - 1) / (micro_batches * repeats + stages - 1)


@dataclasses.dataclass(frozen=True)
class Circular:
    """The circular pipeline (MaxText; GPipe where repeats is 1, Huang et al. 2019, arXiv 1811.06965), differentiated by
    jax: all forward passes, then all backward passes.

    Stage s works at tick t on number n = t - s of its queue: micro-batch n mod M, and on the (n div M)-th of its runs
    of layers; results go round a ring. The layers are cut into R S runs of equal length, in order of depth; stage s
    works on the runs s, S + s, 2 S + s, ... The backward pass keeps the input of each of the M R + S - 1 ticks and
    computes a stage's forward pass anew.

    Parameters stay in order of depth, stage s holding the s-th part: checkpoints of other meshes load, and with
    repeats > 1 they are dealt out anew in each step, R collective permutes of the stage's parameters (and R back for
    their gradients). Gradients are summed over the micro-batches in float32.

    Every example belongs to one micro-batch, whatever its row. What layers report is the mean over micro-batches: a
    balance loss is of each micro-batch, as with accumulated gradients. A buffer's statistic likewise. Randomness: the
    key of the call is split among the micro-batches.

    Knobs: micro_batches M >= 1, as many as 4 S leave a bubble of less than a fifth; repeats R >= 1.
    Refuses M < S where R > 1, and M, R or S that do not divide the rows of the batch, or the periods of the pattern.
    """

    _: dataclasses.KW_ONLY
    micro_batches: int
    repeats: int = 1

    def __post_init__(self):
        if self.micro_batches < 1:
            raise ValueError(f"Circular.micro_batches={self.micro_batches} must be at least 1")
        if self.repeats < 1:
            raise ValueError(f"Circular.repeats={self.repeats} must be at least 1")

    def __call__(self, run: Callable, periods: Any, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
        """(y_BTD, what the periods report, stacked in order of depth).

        periods: a tree of modules whose variables carry a leading "layers" axis. run(periods, x_BTD, ctx, first) ->
        (y_BTD, values): consecutive periods of which the first is number `first` (traced), values stacked over them.
        """
        over = stage_axes("Circular")
        parts = Rows.of(ctx, x_BTD.shape[0], self.micro_batches, "Circular.micro_batches")

        def stage(periods: Any, x_BTD: jax.Array, parts: Rows) -> tuple[jax.Array, Any]:
            return self._stage(over, run, periods, x_BTD, parts)

        y_BTD, values = axes.shard_map(
            stage,
            over=over,
            inputs=(("layers",), ("batch",), parts.places()),
            outputs=(("batch",), (None, "layers")),
            check=False,
        )(periods, x_BTD, parts)
        # [R, S n, ...]: the n periods of run r S + s are the r-th of stage s
        return y_BTD, jax.tree.map(lambda v: jnp.reshape(v, (-1, *v.shape[2:])), values)

    def _stage(self, over: tuple[str, ...], run: Callable, periods: Any, x_BTD: jax.Array, parts: Rows):
        """One stage's part of the layers and rows -> (its rows of the result, [R, n, ...] of what its layers report).

        Raises ValueError where the counts do not fit the number of stages, which is known here.
        """
        M, R, S, stage = self.micro_batches, self.repeats, jax.lax.axis_size(over), jax.lax.axis_index(over)
        share = bubble("circular", S, M, R)
        kernels.take("pipeline", "circular", describe(S, M, R, share))
        held = jax.tree.leaves(periods)[0].shape[0]
        if held % R:
            raise ValueError(
                f"Circular.repeats={R}: Stack.depth must be a multiple of {S * R} times the pattern's length, for "
                f"{S} stages of {R} runs of layers each; the pattern is repeated {held * S} times"
            )
        n = held // R
        queues, parts = deal(periods, over, S, R), parts.gather(over)
        wide = jax.tree.map(lambda p: p.astype(jnp.float32), queues)
        store_MBTD = cut_rows(x_BTD, over, self.micro_batches)

        def work(queues: Any, wide: Any, parts: Rows, x_BTD: jax.Array, m: jax.Array, r: jax.Array, real: jax.Array):
            def at(p: jax.Array) -> jax.Array:
                return p[0] if R == 1 else jax.lax.dynamic_index_in_dim(p, r, 0, False)

            layers = jax.tree.map(lambda p, w: _sum_widely(at(jax.lax.stop_gradient(p)), at(w)), queues, wide)
            layers = _weigh_statistics(layers, jnp.where(real, 1.0 / M, 0.0))
            return run(layers, axes.constrain(x_BTD, *RESIDUAL), parts.context(m), (r * S + stage) * n)

        # Only a stage's input is kept for the backward pass. The loop over ticks keeps common parts apart by itself.
        work = jax.checkpoint(work, prevent_cse=False)

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
            x_BTD, store_MBTD = carry
            turn = jnp.clip(t - stage, 0, M * R - 1)
            m = turn % M
            x_BTD = jnp.where(stage == 0, store_MBTD[m], x_BTD)
            y_BTD, values = work(queues, wide, parts, x_BTD, m, turn // M, turn == t - stage)
            y_BTD = jax.lax.ppermute(y_BTD, over, [(s, (s + 1) % S) for s in range(S)])
            # What comes round to the first stage is the next input of its micro-batch, in the end the result.
            back = (t - (S - 1)) % M
            store_MBTD = store_MBTD.at[back].set(jnp.where(t >= S - 1, y_BTD, store_MBTD[back]))
            return (y_BTD, store_MBTD), values

        # Stages that wait for their first micro-batch compute on one that is as good as any.
        ticks = jnp.arange(M * R + S - 1)
        (_, store_MBTD), values = jax.lax.scan(tick, (store_MBTD[0], store_MBTD), ticks)

        def mean(v: jax.Array) -> jax.Array:  # [ticks, n, ...] -> [R, n, ...]; the ticks that count are in a row
            v = jax.lax.dynamic_slice_in_dim(v, stage, M * R)
            return jnp.mean(jnp.reshape(v, (R, M, *v.shape[1:])), 1)

        return join_rows(store_MBTD, over), jax.tree.map(mean, values)


def describe(stages: int, micro_batches: int, repeats: int, idle: float) -> str:
    """A schedule in words, for the table at the start."""
    rounds = f" x {repeats} repeats" if repeats > 1 else ""
    return f"{stages} stages{rounds}, {micro_batches} micro-batches: {100 * idle:.1f} % of the time is bubble"


def stage_axes(owner: str) -> tuple[str, ...]:
    """The mesh axes of the stages: those of "layers".

    Raises ValueError where there are none, and where the batch is not cut by stages first: rows that come together over
    the stages would otherwise be of other devices than those that the other mesh axes have them on.
    """
    over = axes.mesh_axes("layers")
    if not over:
        raise ValueError(
            f"{owner} needs stages: a mesh axis of more than one device with the rule 'layers', as in the overlay "
            "mesh/pipeline"
        )
    if axes.mesh_axes("batch")[: len(over)] != over:
        raise ValueError(
            f"{owner}: the rule 'batch' lies on {axes.mesh_axes('batch')} and must begin with {over}, the mesh axes "
            "of 'layers'"
        )
    return over


@jax.custom_vjp
def _sum_widely(p: jax.Array, wide: jax.Array) -> jax.Array:
    """p itself; its gradient goes to `wide`, the same in float32 that nothing reads, so that gradients of micro-batches
    are summed in float32 whatever the dtype of p."""
    return p


_sum_widely.defvjp(lambda p, wide: (p, None), lambda _, g: (jnp.zeros_like(g), g.astype(jnp.float32)))


def _weigh_statistics(layers: Any, weight: jax.Array) -> Any:
    """The same modules; what they `axes.measure` counts `weight` times."""
    graph, params, buffers = nnx.split(layers, nnx.Param, axes.Buffer)

    def weigh(b: jax.Array) -> jax.Array:
        still = jax.lax.stop_gradient(b)
        return still + weight * (b - still)

    return nnx.merge(graph, params, jax.tree.map(weigh, buffers))


def deal(periods: Any, over: tuple[str, ...], stages: int, repeats: int) -> Any:
    """A stage's layers in order of depth [R n, ...] -> the runs of layers that it works on, [R, n, ...]."""

    def runs(p: jax.Array) -> jax.Array:
        return jnp.reshape(p, (repeats, -1, *p.shape[1:]))

    if repeats == 1:
        return jax.tree.map(runs, periods)
    rounds, stage = deal_rounds(stages, repeats), jax.lax.axis_index(over)

    def exchange(p: jax.Array) -> jax.Array:
        mine = runs(p)
        got = jnp.zeros_like(mine)
        for sent in rounds:
            outgoing = mine[jnp.asarray([v % repeats for v in sent])[stage]]
            incoming = jax.lax.ppermute(outgoing, over, [(s, v % stages) for s, v in enumerate(sent)])
            repeat_of = {v % stages: v // stages for v in sent}
            got = got.at[jnp.asarray([repeat_of[s] for s in range(stages)])[stage]].set(incoming)
        return got

    return jax.tree.map(exchange, periods)


def deal_rounds(stages: int, repeats: int) -> list[list[int]]:
    """Run v of layers, 0 <= v < S R, lies on stage v div R and is worked on by stage v mod S. rounds[i][s] is the run
    that stage s sends in round i: in each of the R rounds every stage sends one and gets one.

    Such rounds exist because every stage has as many runs to send as to get (König 1916); they are found by augmenting
    paths.
    """
    left = {s: [s * repeats + i for i in range(repeats)] for s in range(stages)}

    def place(s: int, taken: dict[int, int], seen: set[int]) -> bool:
        for v in left[s]:
            to = v % stages
            if to not in seen:
                seen.add(to)
                if to not in taken or place(taken[to] // repeats, taken, seen):
                    taken[to] = v
                    return True
        return False

    rounds = []
    for _ in range(repeats):
        taken: dict[int, int] = {}  # receiving stage -> run
        for s in range(stages):
            place(s, taken, set())
        sent = {v // repeats: v for v in taken.values()}
        rounds.append([sent[s] for s in range(stages)])
        for s, v in sent.items():
            left[s].remove(v)
    return rounds
