"""What to change where a plan does not fit: the three cheapest changes, and what each saves."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.optimizers.moments import Moments
from maxlike.plan.changes import with_mesh, with_micro_batches, with_moments, with_remat
from maxlike.plan.planned import Plan, analytic
from maxlike.plan.trace import trace

# Bytes/s between a device and its host, in one direction, for what is offloaded: PCIe 4 x16 or 5 x8.
HOST_BANDWIDTH = 25e9


@dataclasses.dataclass(frozen=True)
class Change:
    """change: in words. how: on the command line. saves: bytes a device, by formula. slower: the step's predicted
    time in units of today's (1.0 where the speed is not known). fits: whether the plan then fits."""

    change: str
    how: str
    saves: float
    slower: float
    fits: bool

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def cheapest(plan: Plan, count: int = 3) -> list[Change]:
    """The `count` cheapest changes: those that make it fit first, by their time, then by what they save."""
    found = [change for change in _changes(plan) if change.saves > 0]
    found.sort(key=lambda c: (not c.fits, c.slower if c.fits else -c.saves))
    return found[:count]


def _changes(plan: Plan) -> Iterator[Change]:
    for change, how, experiment in _experiments(plan):
        try:
            traced = plan.trace
            if "remat" in change:
                traced = trace(experiment, plan.target.platform)
            yield _change(plan, change, how, analytic(experiment, plan.target, traced))
        except UserError:  # it does not divide
            continue


def _change(plan: Plan, change: str, how: str, after: Plan) -> Change:
    saves = plan.memory.peak - after.memory.peak
    slower = 1.0
    if plan.time is not None:
        slower = (after.time.step + _fetching(after)) / plan.time.step
    return Change(change, how, saves, slower, plan.peak - saves <= plan.limit)


def _fetching(plan: Plan) -> float:
    """Seconds a step of moving the optimizer's state from the host and back."""
    if plan.experiment.step.moments.memory == "device":
        return 0.0
    return 2 * plan.memory.parameters * 2 / HOST_BANDWIDTH


def _experiments(plan: Plan) -> Iterator[tuple[str, str, Experiment]]:
    """(in words, on the command line, the experiment so changed)."""
    experiment, sizes = plan.experiment, plan.shares.sizes
    for remat in ("matmul_half", "full"):
        if plan.remat not in (remat, "full"):
            how = f"--set \"stack.Stack.remat='{remat}'\""
            yield f"remat {remat} in place of {plan.remat}", how, with_remat(experiment, remat)
    for factor in (2, 4):
        micro = experiment.step.micro_batches * factor
        if experiment.batch_size % (micro * plan.shares.batch) == 0:
            how = f"--set step.Step.micro_batches={micro}"
            yield f"{micro} micro-batches", how, with_micro_batches(experiment, micro)
    for source in ("data", "fsdp"):
        for goal in ("fsdp", "tensor"):
            if sizes.get(source, 1) % 2 == 0 and source != goal:
                shape = dict(sizes)
                shape[source], shape[goal] = shape[source] // 2, shape.get(goal, 1) * 2
                shape = {axis: size for axis, size in shape.items() if size > 1}
                words = " x ".join(f"{axis} {size}" for axis, size in shape.items())
                yield f"mesh {words}", f'--set "sharding.Mesh.shape={shape}"', with_mesh(experiment, shape)
    moments = experiment.step.moments
    if moments.dtype == "float32":
        changed = with_moments(experiment, Moments(dtype="bfloat16", memory=moments.memory))
        yield "optimizer state in bfloat16", "--overlay memory/bf16_moments", changed
    if moments.memory == "device":
        changed = with_moments(experiment, Moments(dtype=moments.dtype, memory="pinned_host"))
        yield "optimizer state in the host's memory", "--overlay memory/offload_optimizer", changed
