"""Predicted time of a step: compute, memory and network against the device table, and which of them binds."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

from maxlike.collectives import Collective
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.mfu import Device
from maxlike.plan.layouts import Shares
from maxlike.plan.memory import Memory, rows_a_device
from maxlike.plan.trace import Trace, Work

# Share of the peak that a matrix product reaches, by the smallest of its three dimensions on one device; between them
# by the logarithm, below the first in proportion. Recalled from published GEMM measurements (2024), not measured here.
EFFICIENCY = ((128, 0.15), (512, 0.35), (1024, 0.55), (2048, 0.7))
# Of stacks of small products, as in attention and in chunks of recurrences.
BATCHED_EFFICIENCY = 0.35
# Share of the time of collectives over these mesh axes that hides behind compute.
OVERLAP = {"fsdp": 0.9, "data": 0.9, "tensor": 0.3, "stage": 0.9, "context": 0.8, "expert": 0.0}
# Seconds that a collective takes however small it is.
LATENCY = {"tpu": 2e-6, "gpu": 1e-5}


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one step on one device, and what they are made of.

    flops, memory_bytes: of one device, recomputation included; memory_bytes are the operands and results of matrix
    products, kept activations and the state: a lower bound. compute, memory, network: seconds of each alone. exposed:
    of the network what does not hide behind compute. bubble: share of the step in which a pipeline stage waits.
    """

    flops: float
    memory_bytes: float
    compute: float
    memory: float
    network: float
    exposed: float
    bubble: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory) / (1 - self.bubble) + self.exposed

    @property
    def binds(self) -> str:
        """compute, memory or network: which of them the step takes longest for; of the network what does not hide."""
        return max(("compute", self.compute), ("memory", self.memory), ("network", self.exposed), key=lambda x: x[1])[0]


def efficiency(smallest: float) -> float:
    """Share of the peak of a product whose smallest dimension on a device is this."""
    low = EFFICIENCY[0]
    if smallest <= low[0]:
        return low[1] * smallest / low[0]
    for high in EFFICIENCY[1:]:
        if smallest <= high[0]:
            along = math.log(smallest / low[0]) / math.log(high[0] / low[0])
            return low[1] + along * (high[1] - low[1])
        low = high
    return low[1]


def flops(experiment: Experiment, shares: Shares, trace: Trace) -> float:
    """FLOPs of matrix products that one device does in a step, recomputation included."""
    rows = rows_a_device(experiment, shares) * experiment.step.micro_batches
    row = sum(w.flops / shares.width_parts(w.sizes) for w in _works(shares, trace))
    update = sum(p.flops for p in trace.update) / shares.layout.mesh.size
    return rows * row / shares.context + update


def predict(
    experiment: Experiment,
    shares: Shares,
    trace: Trace,
    memory: Memory,
    collectives: Sequence[Collective],
    links: "Links",
) -> Time:
    """The time of a step on devices of the table."""
    device = links.device
    micro = experiment.step.micro_batches
    rows = rows_a_device(experiment, shares)
    share = 1 / shares.context
    tokens = rows * shares.stage / shares.ticks * experiment.sequence_length / shares.context  # at a time
    seconds = functools.partial(_seconds, shares=shares, tokens=tokens, device=device)
    compute = micro * rows * share * sum(seconds(work) for work in _works(shares, trace))
    compute += sum(p.flops for p in trace.update) / shares.layout.mesh.size / (device.peak * EFFICIENCY[-1][1])
    moved = micro * share * sum(_moved(work, shares, rows, device.platform == "gpu") for work in _works(shares, trace))
    state = memory.parameters + memory.optimizer
    moved += 2 * (state + micro * (memory.gradients + memory.kept))
    network, exposed = exchange(collectives, links, compute)
    return Time(
        flops=flops(experiment, shares, trace),
        memory_bytes=moved,
        compute=compute,
        memory=moved / device.bandwidth,
        network=network,
        exposed=exposed,
        bubble=shares.bubble,
    )


def _works(shares: Shares, trace: Trace) -> Iterator[Work]:
    """The products of a row. In a pipeline the layers' forward pass comes once more; in 1F1B every stage has the head
    of every row, where a device otherwise has that of its own rows."""
    if shares.one_f_one_b:
        for work in trace.row:
            times = shares.stage if trace.vocab in work.sizes else 1
            yield dataclasses.replace(work, flops=times * work.flops, times=times * work.times)
    else:
        yield from trace.row
    if shares.stage > 1:
        yield from trace.again


def _seconds(work: Work, *, shares: Shares, tokens: float, device: Device) -> float:
    """Of one row. Raises UserError where the device cannot multiply such numbers."""
    peak = device.peak_of(work.dtype)
    if peak is None:
        raise UserError(
            f"{device.name} has no {work.dtype} products: leave the precision overlay away, or plan for another "
            "device (Float8.emulate=True and Int8.emulate=True round, and multiply in bfloat16)"
        )
    reached = BATCHED_EFFICIENCY
    if not work.batched:
        reached = efficiency(min(tokens, *(d / shares.cut_sizes.get(d, 1) for d in work.dims)))
    return work.flops / shares.width_parts(work.sizes) / (peak * reached)


def _moved(work: Work, shares: Shares, rows: float, fused: bool) -> float:
    """Bytes of all executions. fused: scores of attention never reach memory."""
    arrays = sorted(rows * a + b for a, b in zip(work.a_row, work.fixed))
    return work.times * sum(arrays[:2] if fused and work.batched else arrays) / shares.width_parts(work.sizes)


@dataclasses.dataclass(frozen=True)
class Links:
    """How devices are linked. sizes: of the mesh axes, which lie in order: the last axis on the nearest devices. outer:
    over how many slices each goes, all 1 in one slice. torus: of a slice of TPUs, None for GPUs."""

    device: Device
    sizes: dict[str, int]
    outer: dict[str, int]
    torus: tuple[int, ...] | None

    def seconds(self, axes: Sequence[str], sent: float) -> float:
        """Of a collective in which a device sends so many bytes. Over o slices it works within each slice first; of n
        devices in all, (o - 1) / (n - 1) of the bytes of a ring are then left for the network between slices."""
        o, n = (math.prod(sizes[a] for a in axes) for sizes in (self.outer, self.sizes))
        if o == 1:
            return sent / self.bandwidth(axes)
        within = sent / self.bandwidth(axes) if n > o else 0.0
        return within + sent * (o - 1) / (n - 1) / self.device.network

    def bandwidth(self, axes: Sequence[str]) -> float:
        """Bytes/s that a device sends in a ring along the part of mesh axes inside a slice, in one direction."""
        sizes = {name: size // self.outer[name] for name, size in self.sizes.items()}
        names, device = list(sizes), self.device
        inside = math.prod(sizes[name] for name in names[max(names.index(a) for a in axes) + 1 :])
        count = math.prod(sizes[a] for a in axes)
        if self.torus is not None:
            # A ring through whole dimensions of the torus uses the links of each; a closed one those of both ends.
            spanned, reached = [], inside
            for size in reversed(self.torus):
                if reached >= size:
                    reached /= size
                elif math.prod(spanned) < count:
                    spanned.append(size)
            ends = [2 if device.wrap and size % device.wrap == 0 else 1 for size in spanned if size > 1]
            return device.link * max(sum(ends), 1)
        node = device.node or 1
        if inside * count <= node:
            return device.link
        return min(device.link, device.network * max(node // inside, 1)) if inside < node else device.network


def exchange(collectives: Iterable[Collective], links: Links, compute: float) -> tuple[float, float]:
    """(seconds of all collectives, of them what does not hide behind `compute` seconds)."""
    by_axes: dict[tuple[str, ...], float] = {}
    for c in collectives:
        seconds = c.times * (links.seconds(c.axes, c.bytes) + LATENCY[links.device.platform])
        by_axes[c.axes] = by_axes.get(c.axes, 0.0) + seconds
    exposed = 0.0
    for axes, seconds in by_axes.items():
        exposed += max(0.0, seconds - min(OVERLAP[axis] for axis in axes) * compute)
    return sum(by_axes.values()), exposed
