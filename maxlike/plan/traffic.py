"""Predicted collectives of a step, by formula from the parameter tree and the rules.

Bytes are what a device sends in one execution, by the convention of `maxlike.collectives`.
"""

import math
from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from maxlike.collectives import Collective
from maxlike.experiment import Experiment
from maxlike.plan.dispatched import Mixture, mixtures
from maxlike.plan.layouts import Shares, Weight
from maxlike.plan.memory import rows_a_device
from maxlike.plan.trace import Trace

# How often a remat policy runs a branch's gather and its summed output again in the backward pass.
_GATHERED_AGAIN = {"none": 0.0}
_SUMMED_AGAIN = {"full": 1.0}


def predict(experiment: Experiment, shares: Shares, trace: Trace, platform: str, remat: str) -> list[Collective]:
    """All collectives of one step of more than a few bytes."""
    step = experiment.step
    size = jnp.dtype(step.compute_dtype).itemsize
    rows = rows_a_device(experiment, shares)
    stream = rows * experiment.sequence_length / shares.context * trace.dim * size
    job = _Job(shares, platform, step.micro_batches, size, stream, trace)
    found = list(job.weights(remat))
    if shares.tensor > 1:
        found += job.branches(remat)
    if shares.context > 1:
        found += job.ring(remat)
    if shares.parts(shares.expert_axes) > 1:
        found += job.exchange(mixtures(experiment, shares, trace, rows), remat)
    if shares.stage > 1:
        found += job.stages()
    return [c for c in found if c.bytes * c.times > 0]


class _Job:
    """One step: M micro-batches, activations of `size` bytes, a residual stream of `stream` bytes a device and
    micro-batch (whole width)."""

    def __init__(self, shares: Shares, platform: str, micro: int, size: int, stream: float, trace: Trace):
        self.shares, self.micro, self.size, self.stream, self.trace = shares, micro, size, stream, trace
        self.on_cpu = platform == "cpu"
        # A pipeline computes a stage's forward pass anew; at each of its turns (it works on anything while it fills and
        # drains) a stage has `turn` bytes of the stream in its part of the layers, all layers having had it `rounds`
        # times in the end.
        self.anew = 0 if shares.stage == 1 else 1
        self.turn = stream * shares.stage / shares.ticks
        self.rounds = micro * shares.turns / (shares.stage * shares.repeats)

    def _make(self, kind: str, axes: tuple[str, ...], array: float, times: float, name: str) -> Collective:
        axes, n = tuple(axis for axis in self.shares.sizes if axis in axes), self.shares.parts(axes)
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        dtype = {4: "f32", 2: "bf16"}[self.size]
        return Collective(kind, axes, dtype, round(array * factor), round(times), name)

    def _sum(self, axes: tuple[str, ...], array: float, times: float, name: str) -> Collective:
        """Of an array whose result is cut over `axes`. A CPU sums all of it everywhere, and cuts then."""
        return self._make("all-reduce" if self.on_cpu else "reduce-scatter", axes, array, times, name)

    def weights(self, remat: str) -> Iterator[Collective]:
        """Gathers of stored weights, sums of gradients."""
        for weight in self.shares.weights:
            if weight.name.startswith("embed/") and weight.layers == 1 and "embed_out" not in weight.axes:
                yield from self._embedding(weight)
                if self._is_head(weight):
                    yield from self._head(weight)
            elif weight.name.startswith("head/"):
                yield from self._head(weight)
            else:
                yield from self._ordinary(weight, remat)

    def _is_head(self, weight: Weight) -> bool:
        """Whether the token table is the head too."""
        return weight.axes[0] == "vocab" and not any(w.axes == ("embed", "vocab") for w in self.shares.weights)

    def _ordinary(self, weight: Weight, remat: str) -> Iterator[Collective]:
        shares, layers = self.shares, max(weight.layers / self.shares.stage, 1) * self.shares.turns
        within = [axis for axis in weight.cut if axis not in shares.stage_axes]
        whole = weight.size / weight.layers / shares.parts(within) * self.size
        rest = tuple(a for a in shares.batch_axes + shares.length_axes if a not in (*weight.stored, *weight.cut))
        # Experts come together inside a shard_map: a gathered weight is kept there, a gradient cut where it is summed.
        of_experts = {"experts", "mlp"} <= set(weight.axes)
        if shares.parts(weight.stored) > 1:
            # Forward and backward, where recomputing shares the second one; once where the first one is kept.
            once = remat == "none" and (of_experts or weight.layers == 1)
            # A pipeline computes a stage's forward pass anew, whatever is kept within it.
            passes = 3 if shares.stage > 1 and weight.layers > 1 else 1 if once else 2
            yield self._make("all-gather", weight.stored, whole, passes * layers * self.micro, weight.name)
            if of_experts:
                yield self._make("reduce-scatter", weight.stored, whole, layers * self.micro, weight.name)
            else:
                yield self._sum(weight.stored, whole, layers * self.micro, weight.name)
        if shares.parts(rest) > 1:
            part = whole / shares.parts(weight.stored)
            yield self._make("all-reduce", rest, part, layers * self.micro, weight.name)

    def _embedding(self, weight: Weight) -> Iterator[Collective]:
        """Tokens travel, not the table (`layers.embed.lookup`): vectors summed over the devices of other ids, exchanged
        by columns; backward the way back. In 1F1B at every tick, from a table that was gathered before."""
        shares = self.shares
        rest = tuple(a for a in shares.batch_axes + shares.length_axes if a not in weight.stored)
        if shares.parts(weight.cut) > 1:
            yield self._make("reduce-scatter", weight.cut, self.stream, self.micro, weight.name)
            yield self._make("all-gather", weight.cut, self.stream, self.micro, weight.name)
        if shares.parts(weight.stored) > 1:
            part = self.stream / shares.parts(weight.cut)
            if shares.one_f_one_b:
                part *= shares.stage * shares.turns / shares.ticks
                table = weight.size * self.size / shares.parts(weight.cut)
                yield self._make("all-gather", weight.stored, table, self.micro, weight.name)
            yield self._make("all-to-all", weight.stored, part, 2 * self.micro, weight.name)
        if shares.parts(rest) > 1:
            table = weight.size * self.size / shares.parts((*weight.stored, *weight.cut))
            yield self._make("all-reduce", rest, table, self.micro, weight.name)

    def _head(self, weight: Weight) -> Iterator[Collective]:
        """Gathered for the loss, its float32 gradient summed behind the last chunk of logits; in 1F1B on each stage for
        each micro-batch, and then over the stages."""
        shares = self.shares
        part = weight.size / shares.parts(weight.cut)
        if shares.parts(weight.stored) > 1:
            times = 1 if self.on_cpu else self.micro
            yield self._make("all-gather", weight.stored, part * self.size, times, weight.name)
        axes, times = tuple(dict.fromkeys(shares.batch_axes + shares.length_axes)), self.micro
        if shares.one_f_one_b:
            axes, times = tuple(axis for axis in axes if axis not in shares.stage_axes), self.micro * shares.ticks
        if shares.parts(axes) > 1:
            yield self._make("all-reduce", axes, part * 4, times, weight.name)

    def branches(self, remat: str) -> Iterator[Collective]:
        """Tensor parallel: a branch reads whole positions and its output is summed; backward the same, once for each
        weight that reads the stream."""
        shares, axes = self.shares, self.shares.tensor_axes
        out = self._count(lambda w: w.axes[-1] == "embed" and set(w.cut) & set(axes))
        into = self._count(lambda w: w.axes[1:2] == ("embed",) and len(w.axes) > 2 and set(w.cut) & set(axes))
        again = _GATHERED_AGAIN.get(remat, 1.0), _SUMMED_AGAIN.get(remat, 0.0)
        blocks = self.trace.depth
        kind = "branches"
        if shares.sequence_parallel:
            yield self._make("all-gather", axes, self.turn, self.rounds * out * (2 + self.anew + again[0]), kind)
        else:
            again = (0.0, again[1])
        # The last output of a block is not needed to recompute it.
        passes = out * (1 + self.anew) + again[1] * (out - blocks)
        yield self._sum(axes, self.turn, self.rounds * passes, kind)
        yield self._sum(axes, self.turn, self.rounds * into, kind)
        yield self._make("all-gather", axes, self.stream, self.micro, "loss")
        yield self._make("all-reduce", axes, self.stream, self.micro, "loss")

    def _count(self, chosen) -> float:
        return sum(w.layers for w in self.shares.weights if w.layers > 1 and chosen(w))

    def ring(self, remat: str) -> Iterator[Collective]:
        """Context parallel: keys and values go once round the ring forward, and backward again with their gradients,
        which are float32 until they go home. Gathered: all to every device, gradients summed on the way back."""
        shares, axes = self.shares, self.shares.length_axes
        again = self.anew + (1 if remat == "full" else 0)
        kv = sum(
            w.layers * math.prod(w.shape[2:]) / shares.parts(a for a in w.cut if a in shares.tensor_axes)
            for w in shares.weights
            if w.layers > 1 and w.axes[1:3] in (("embed", "kv_heads"), ("latent_in", "kv_heads"))
        )
        # Keys and values of the layers and positions that a device has at a time.
        part = self.turn / self.trace.dim * kv / (shares.stage * shares.repeats)
        times = self.micro * shares.turns
        if shares.layout.keys == "gather":
            whole = part * shares.context
            yield self._make("all-gather", axes, whole, times * (1 + again), "keys")
            yield self._make("reduce-scatter", axes, whole, times, "keys")
        else:
            hops = (2 + again + 4 / self.size) * (shares.context - 1) + 1
            yield self._make("collective-permute", axes, part * hops, times, "ring")

    def exchange(self, spread: Iterable[Mixture], remat: str) -> Iterator[Collective]:
        """Expert parallel: rows to their experts and back, forward and backward, and the first two once more where the
        backward pass computes them anew. Empty places travel too."""
        axes = self.shares.expert_axes
        again, row = self.anew + (0 if remat == "none" else 1), self.trace.dim * self.size * self.turn / self.stream
        for mixture in spread:
            name, times = mixture.weight.name, mixture.weight.layers * self.rounds
            if mixture.kind == "all_to_all":
                yield self._make("all-to-all", axes, mixture.places * row, times * (4 + 2 * again), name)
            elif mixture.kind == "gather":
                yield self._make("all-gather", axes, mixture.gathered * row, times * (2 + again), name)
                yield self._make("reduce-scatter", axes, mixture.gathered * row, times * 2, name)
            else:
                yield self._make("all-reduce", axes, self.turn, times * 2, name)

    def stages(self) -> Iterator[Collective]:
        """Pipeline: each tick the stream of a micro-batch to the next stage, its gradient back. The circular one brings
        rows to the first stage and from it back to theirs."""
        cut = self.shares.tensor if self.shares.sequence_parallel else 1
        yield self._make(
            "collective-permute", self.shares.stage_axes, self.turn / cut, 2 * self.micro * self.shares.turns, "stages"
        )
        if not self.shares.one_f_one_b:
            rows = 2 * 2 * (self.shares.stage - 1) * self.micro
            yield self._make(
                "collective-permute", self.shares.stage_axes, self.stream / cut, rows, "rows of the stages"
            )
