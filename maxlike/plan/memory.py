"""Predicted memory of one device, without compiling: the state exactly, what a step adds to it by formula."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from maxlike.experiment import Experiment
from maxlike.objectives.cross_entropy import CHUNK_BYTES, FEWEST_CHUNKS
from maxlike.plan.dispatched import Mixture, mixtures
from maxlike.plan.layouts import Shares
from maxlike.plan.trace import Kept, Trace
from maxlike.program import Program

# Float32 arrays of the size of a chunk of logits, or of a tile of scores, that are alive at a time: the product, its
# exponential, and its gradient.
ALIVE = 3


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    parameters, optimizer, other: of the train state (other: averages, buffers, counters). batch: the step's tokens.
    gradients: float32, twice with micro-batches (the sum, and the part being made). copy: the parameters in the compute
    dtype. kept: activations that wait for the backward pass. working: one block's backward pass, with its gathered
    weights, or the loss, whichever is larger.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int
    gradients: float
    copy: float
    kept: float
    working: float

    @property
    def arguments(self) -> int:
        """Bytes that the step is given: exact."""
        return self.parameters + self.optimizer + self.other + self.batch

    @property
    def temporary(self) -> float:
        """What the compiler calls temporaries."""
        return self.gradients + self.copy + self.kept + self.working

    @property
    def peak(self) -> float:
        """The state is donated, so outputs lie where it lay."""
        return self.arguments + self.temporary


def local_bytes(tree: Any) -> int:
    """Bytes on one device of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes of the train state on one device; parameters, optimizer, other as in Memory."""

    parameters: int
    optimizer: int
    other: int

    @classmethod
    def of(cls, program: Program, on_host: bool) -> "State":
        """Exact. on_host: whether the optimizer's state lies in the host's memory."""
        state = program.state
        others = {name: leaf for name, leaf in state.items() if name not in ("params", "opt")}
        allowed = 1  # a flag beside the state: whether the update is allowed
        optimizer = 0 if on_host else local_bytes(state["opt"])
        return cls(local_bytes(state["params"]), optimizer, local_bytes(others) + allowed)


def predict(experiment: Experiment, state: State, shares: Shares, trace: Trace, platform: str, remat: str) -> Memory:
    """The memory of one device."""
    rows = rows_a_device(experiment, shares)
    dtype = jnp.dtype(experiment.step.compute_dtype)
    local = state.parameters
    shape = (experiment.batch_size, experiment.sequence_length)
    spread = tuple(mixtures(experiment, shares, trace, rows))
    waiting = jnp.dtype(experiment.step.accumulate_dtype).itemsize if experiment.step.micro_batches > 1 else 0
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        other=state.other,
        batch=6 * 4 * math.prod(shares.layout.batch(shape).shard_shape(shape)),
        gradients=local * (1 + waiting / 4),
        copy=0 if dtype == jnp.float32 else local * dtype.itemsize / 4,
        kept=_kept(experiment, shares, trace, spread, rows, remat),
        working=max(
            _block(shares, trace, rows, dtype.itemsize)
            + _dispatch(shares, trace, spread, dtype.itemsize)
            + _gathered(experiment, shares, trace, rows * shares.stage / shares.ticks, dtype.itemsize),
            _loss(experiment, shares, trace, rows, dtype.itemsize, platform),
        ),
    )


def rows_a_device(experiment: Experiment, shares: Shares) -> float:
    """Rows of a micro-batch on one device. Stages of a pipeline share the rows: each works on all of theirs in its part
    of the layers, which is as much as on its own rows in all layers."""
    return experiment.batch_size / experiment.step.micro_batches / shares.batch


def chunk(experiment: Experiment, shares: Shares, trace: Trace, platform: str) -> int:
    """Positions of a device whose logits exist at a time, by the rule of `maxlike.objectives.cross_entropy`."""
    length = -(-experiment.sequence_length // shares.context)
    vocab = trace.vocab // shares.parts(shares.layout.mesh_axes("act_vocab"))
    rows = max(1, int(rows_a_device(experiment, shares)))
    return max(1, min(CHUNK_BYTES[platform] // (4 * rows * vocab), -(-length // FEWEST_CHUNKS)))


def _kept(
    experiment: Experiment, shares: Shares, trace: Trace, spread: tuple[Mixture, ...], rows: float, remat: str
) -> float:
    """Activations that wait. Of a pipeline: what a stage's layers began with at each of its turns (of 1F1B, for the
    micro-batches under way), and what one turn, computed anew, keeps for its backward pass."""

    def whole(kept: Iterable[Kept]) -> float:
        return sum(rows * k.a_row / shares.context / _parts(shares, k, trace) for k in kept)

    size = jnp.dtype(experiment.step.compute_dtype).itemsize
    placed = sum(m.weight.layers * (m.places - m.choices) * m.kept(remat, shares) for m in spread) * size
    if shares.stage == 1:
        return whole(trace.kept) + placed
    turn = shares.stage / shares.ticks  # of a micro-batch, in units of a device's own rows
    begun = rows * turn * experiment.sequence_length / shares.context * trace.dim * size
    if shares.sequence_parallel:
        begun /= shares.tensor
    layers = whole(k for k in trace.kept if k.stacked > 1) + placed
    rest = whole(k for k in trace.kept if k.stacked == 1)
    if shares.one_f_one_b:
        return (2 * shares.stage - 1) * begun + layers / shares.ticks + rest * turn
    return shares.turns * begun + layers / shares.ticks / shares.repeats + rest


def _parts(shares: Shares, kept: Kept, trace: Trace) -> int:
    return shares.tensor if shares.sequence_parallel else shares.width_parts(kept.sizes - {trace.dim})


def _block(shares: Shares, trace: Trace, rows: float, itemsize: int) -> float:
    """One block's backward pass: what a forward pass of it keeps, a tile of scores, and its weights whole (gradients
    take the place of what they used up)."""
    stacked = [k for k in trace.block if k.stacked > 1]
    rows = rows * shares.stage / shares.ticks  # of a pipeline's micro-batch
    arrays = sum(rows * k.a_row / k.stacked / _parts(shares, k, trace) for k in stacked)
    tile = max((w.a_row[2] / shares.width_parts(w.sizes) for w in trace.row if w.batched), default=0.0)
    weights = sum(w.size / w.layers / shares.parts(w.cut) for w in shares.weights if w.layers > 1 and w.stored)
    blocks = max(trace.blocks, 1)
    return (arrays / blocks + ALIVE * rows * tile) / shares.context + weights * itemsize / blocks


def _dispatch(shares: Shares, trace: Trace, spread: tuple[Mixture, ...], itemsize: int) -> float:
    """Of one block: the rows of a mixture's arrays that it would not have with all experts on one device, empty places
    among them, and the two arrays of an exchange, of rows and of their gradients."""
    mine = [m for m in spread if m.weight.layers > 1]
    more = sum((m.places - m.choices) * m.kept("none", shares) for m in mine)
    exchanged = sum(4 * m.exchanged * trace.dim for m in mine)
    return (more + exchanged) * itemsize * shares.stage / shares.ticks / max(trace.blocks, 1)


def _gathered(experiment: Experiment, shares: Shares, trace: Trace, rows: float, itemsize: int) -> float:
    """The residual stream whole, and its gradient, inside a branch of devices that share its width."""
    if not shares.sequence_parallel or shares.tensor == 1:
        return 0.0
    return 2 * rows * experiment.sequence_length / shares.context * trace.dim * itemsize


def _loss(experiment: Experiment, shares: Shares, trace: Trace, rows: float, itemsize: int, platform: str) -> float:
    """A chunk of logits, the head whole, and its float32 gradient before it is summed over devices."""
    vocab = trace.vocab / shares.parts(shares.layout.mesh_axes("act_vocab"))
    positions = chunk(experiment, shares, trace, platform)
    whole = itemsize + 2 * 4 if shares.batch > 1 else 4
    return ALIVE * 4 * rows * positions * vocab + trace.dim * vocab * whole
