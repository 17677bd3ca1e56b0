"""`--search`: the meshes, remat policies and micro-batches that fit, by predicted tokens/s."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan.layouts import with_mesh
from maxlike.plan.planned import Placed, Plan, analytic
from maxlike.plan.targets import Target
from maxlike.plan.trace import Trace, trace, with_micro_batches, with_remat
from maxlike.sharding import flat_axes

REMAT = ("none", "matmul_half", "full")
# Tensor parallel beyond the fast domain never wins (arXiv 2312.12705); on a torus beyond 16 neither.
WIDEST = 16

Key = tuple[tuple[tuple[str, int], ...], str, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan of the search. sensitivity: change of the step's predicted time, as a share of it, when one knob alone
    changes, for those neighbours that the search has looked at."""

    plan: Plan
    sensitivity: dict[str, float]

    def plain(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "mesh": dict(plan.shares.sizes),
            "remat": plan.remat,
            "micro_batches": plan.experiment.step.micro_batches,
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "step_seconds": plan.time.step,
            "peak": round(plan.peak),
            "binds": plan.time.binds,
            "sensitivity": self.sensitivity,
        }


def rank(plan: Plan, top: int, found: dict[Key, Plan] | None = None) -> list[Candidate]:
    """The `top` fastest candidates that fit. found: of `evaluate`, None to call it.

    Raises UserError where nothing fits, with what comes closest, or where the target's speed is not known.
    """
    check(plan.target)
    found = evaluate(plan.experiment, plan.target) if found is None else found
    if not found:
        raise UserError(
            f"no mesh of {plan.target.count} devices divides this experiment: change Experiment.batch_size or --devices"
        )
    fitting = [(key, made) for key, made in found.items() if made.fits]
    if not fitting:
        closest = min(found.values(), key=lambda made: made.peak)
        count = smallest_count(plan.experiment, plan.target, closest)
        hint = "" if count is None else f"; {count} devices are enough"
        raise UserError(
            f"nothing fits {plan.target.word}: the least that a device needs is {closest.peak / 1e9:.1f} GB of "
            f"{closest.limit / 1e9:.1f} GB, with {closest.shares.sizes}, remat {closest.remat} and "
            f"{closest.experiment.step.micro_batches} micro-batches{hint}"
        )
    fitting.sort(key=lambda item: item[1].time.step)
    best: dict[tuple, tuple[Key, Plan]] = {}
    for key, made in fitting:  # of a mesh and remat the fastest micro-batches alone
        best.setdefault(key[:2], (key, made))
    return [Candidate(made, _sensitivity(key, found)) for key, made in list(best.values())[:top]]


def check(target: Target) -> None:
    """Raises UserError for a target on which nothing can be ranked."""
    if target.device is None:
        raise UserError(f"--search ranks by time, and the speed of {target.word} is not known: use --hardware")


def evaluate(experiment: Experiment, target: Target) -> dict[Key, Plan]:
    """Every candidate that divides, whether it fits or not."""
    traces: dict[str, tuple[Experiment, Trace]] = {}
    for remat in REMAT:
        changed = with_remat(experiment, remat)
        traces[remat] = changed, trace(changed, target.platform)
    found = {}
    for shape in meshes(experiment, target.count):
        try:
            at = Placed.of(with_mesh(experiment, shape), target.count)
        except UserError:  # an axis of it does not divide
            continue
        for remat, micro in itertools.product(REMAT, _micro_batches(experiment, at)):
            changed, traced = traces[remat]
            changed = with_micro_batches(with_mesh(changed, shape), micro)
            found[tuple(shape.items()), remat, micro] = analytic(changed, target, traced, at)
    return found


def smallest_count(experiment: Experiment, target: Target, closest: Plan) -> int | None:
    """The smallest power of two times the target's devices on which the closest plan fits, sharding wider; None: not up
    to 64 times."""
    for times in (2, 4, 8, 16, 32, 64):
        shape = dict(closest.shares.sizes)
        shape["fsdp"] = shape.get("fsdp", 1) * times
        wider = dataclasses.replace(target, count=target.count * times)
        try:
            made = analytic(with_mesh(closest.experiment, shape), wider, closest.trace)
        except UserError:
            continue
        if made.fits:
            return wider.count
    return None


def meshes(experiment: Experiment, devices: int) -> Iterator[dict[str, int]]:
    """Shapes over data, fsdp, expert (with experts), tensor, and stages and context where the experiment's own mesh has
    them, in the order from the slowest links to the fastest."""
    own = experiment.mesh.shape
    axes = {axis for weight in _axes(experiment) for axis in weight}
    names = [name for name in ("stage", "context") if own.get(name, 1) != 1]
    fixed = {name: own[name] for name in names}
    left = devices
    for size in fixed.values():
        left //= size
    for tensor in _divisors(left):
        if tensor > WIDEST:
            continue
        for expert in _divisors(left // tensor) if "experts" in axes else (1,):
            for fsdp in _divisors(left // tensor // expert):
                data = left // tensor // expert // fsdp
                sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
                shape = {**({"stage": fixed["stage"]} if "stage" in fixed else {}), **sizes, **fixed}
                yield {name: size for name, size in shape.items() if size > 1} or {"data": 1}


def _axes(experiment: Experiment) -> list[tuple[str, ...]]:
    return list(flat_axes(experiment.abstract_model().axes).values())


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _micro_batches(experiment: Experiment, at: Placed) -> list[int]:
    """Powers of two, and the experiment's own, that leave whole rows on every device."""
    rows = experiment.batch_size
    wanted = {2**i for i in range(10)} | {experiment.step.micro_batches}
    return sorted(m for m in wanted if rows % (m * at.shares.batch) == 0)


def _sensitivity(key: Key, found: dict[Key, Plan]) -> dict[str, float]:
    """The poor man's SHAP: one knob changed, all others the same."""
    mesh, remat, micro = key
    here = found[key].time.step
    neighbours = {f"remat {other}": (mesh, other, micro) for other in REMAT if other != remat}
    neighbours |= {f"micro-batches x{factor:g}": (mesh, remat, round(micro * factor)) for factor in (0.5, 2)}
    for big, small in itertools.permutations(dict(mesh), 2):
        neighbours[f"{big} x2, {small} /2"] = (_moved(dict(mesh), big, small), remat, micro)
    return {
        knob: found[other].time.step / here - 1 for knob, other in neighbours.items() if other in found and other != key
    }


def _moved(sizes: dict[str, int], big: str, small: str) -> tuple[tuple[str, int], ...]:
    sizes[big], sizes[small] = sizes[big] * 2, sizes[small] // 2
    return tuple((name, size) for name, size in sizes.items() if size > 1)
