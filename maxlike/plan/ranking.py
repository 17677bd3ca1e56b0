"""`--search`: the meshes, remat policies and micro-batches that fit, by predicted tokens/s."""

import dataclasses
import functools
import itertools
from typing import Any

from layers.parts import parts
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan import candidates
from maxlike.plan.changes import with_mesh, with_micro_batches, with_pipeline, with_remat
from maxlike.plan.planned import Placed, Plan, analytic
from maxlike.plan.targets import Target
from maxlike.plan.trace import trace

Shape = tuple[tuple[str, int], ...]
# (mesh, remat, Step.micro_batches, micro-batches of a pipeline: 1 without stages)
Key = tuple[Shape, str, int, int]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan of the search. sensitivity: change of the step's predicted time, as a share of it, when one knob alone
    changes, for those neighbours that the search has looked at. how: what to put on the command line to run it."""

    plan: Plan
    sensitivity: dict[str, float]
    how: str

    def plain(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "mesh": dict(plan.shares.sizes),
            "remat": plan.remat,
            "micro_batches": plan.experiment.step.micro_batches,
            "pipeline_micro_batches": plan.shares.ticks if plan.shares.stage > 1 else None,
            "how": self.how,
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "step_seconds": plan.time.step,
            "peak": round(plan.peak),
            "binds": plan.time.binds,
            "sensitivity": self.sensitivity,
        }


def rank(experiment: Experiment, target: Target, top: int, found: dict[Key, Plan] | None = None) -> list[Candidate]:
    """The `top` fastest candidates that fit, and that no layer and no rule refuses. found: of `evaluate`, None to call
    it.

    Raises UserError where nothing fits, with what comes closest, or where the target's speed is not known.
    """
    check(target)
    found = evaluate(experiment, target) if found is None else found
    if not found:
        raise UserError(
            f"no mesh of {target.count} devices divides this experiment: change Experiment.batch_size or --devices"
        )
    fitting = [(key, made) for key, made in found.items() if made.fits]
    if not fitting:
        closest = min(found.values(), key=lambda made: made.peak)
        count = smallest_count(closest)
        hint = "" if count is None else f"; {count} devices are enough"
        raise UserError(
            f"nothing fits {target.word}: the least that a device needs is {closest.peak / 1e9:.1f} GB of "
            f"{closest.limit / 1e9:.1f} GB, with {closest.shares.sizes}, remat {closest.remat} and "
            f"{closest.experiment.step.micro_batches} micro-batches{hint}"
        )
    fitting.sort(key=lambda item: item[1].time.step)
    best: dict[tuple[Shape, str], Candidate] = {}
    refusals: dict[Shape, str | None] = {}  # what refuses a mesh refuses it with other micro-batches too
    for key, made in fitting:
        mesh, remat, *_ = key
        if (mesh, remat) in best:  # of a mesh and remat the fastest micro-batches alone
            continue
        if mesh not in refusals:
            refusals[mesh] = candidates.refusal(made.experiment, target.count, target.platform)
        if refusals[mesh] is None:
            best[mesh, remat] = Candidate(made, _sensitivity(key, found), _how(experiment, made))
        if len(best) == top:
            break
    if not best:
        raise UserError(
            f"every mesh that fits {target.word} is refused, the fastest so: {next(iter(refusals.values()))}"
        )
    return list(best.values())


def _how(experiment: Experiment, made: Plan) -> str:
    """Overlay and bindings that make the plan's experiment out of the one that was asked about."""
    words = []
    if made.shares.stage > 1 and candidates.own_ticks(experiment) is None:
        words += ["--overlay mesh/pipeline", f"--set micro_batches={made.shares.ticks}"]
    words.append(f'--set "sharding.Mesh.shape={made.shares.sizes}"')
    if made.remat != parts(experiment.bare(), Stack)[0].remat:
        words.append(f"--set \"stack.Stack.remat='{made.remat}'\"")
    if made.experiment.step.micro_batches != experiment.step.micro_batches:
        words.append(f"--set step.Step.micro_batches={made.experiment.step.micro_batches}")
    return " ".join(words)


def check(target: Target) -> None:
    """Raises UserError for a target on which nothing can be ranked."""
    if target.device is None:
        raise UserError(f"--search ranks by time, and the speed of {target.word} is not known: use --hardware")


def evaluate(experiment: Experiment, target: Target) -> dict[Key, Plan]:
    """Every candidate that divides, whether it fits or not."""
    own = candidates.own_ticks(experiment)

    @functools.cache
    def changed(remat: str, ticks: int) -> Experiment:
        """Traced once, whatever the mesh."""
        made = with_remat(experiment, remat)
        made = made if ticks == 1 or own is not None else with_pipeline(made, ticks)
        made.abstract_model()
        return made

    traces = {remat: trace(changed(remat, 1), target.platform) for remat in candidates.REMAT}
    found, other = {}, None
    for shape in candidates.meshes(experiment, target.count, target.platform):
        stages = shape.get("stage", 1)
        try:
            at = other = Placed.of(with_mesh(changed("none", stages), shape), target.count, other)
        except UserError:  # an axis of it does not divide
            continue
        for micro in candidates.micro_batches(experiment, at.shares):
            for ticks in candidates.ticks(experiment, at.shares, micro, own):
                passed = at if own is not None or stages == 1 else at.with_ticks(ticks)
                for remat in candidates.REMAT:
                    made = with_micro_batches(with_mesh(changed(remat, ticks), shape), micro)
                    key = tuple(shape.items()), remat, micro, ticks
                    found[key] = analytic(made, target, traces[remat], passed)
    return found


def smallest_count(closest: Plan) -> int | None:
    """The smallest power of two times the plan's devices on which it fits, sharding wider; None: not up to 64 times."""
    target = closest.target
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


def _sensitivity(key: Key, found: dict[Key, Plan]) -> dict[str, float]:
    """The poor man's SHAP: one knob changed, all others the same."""
    mesh, remat, micro, ticks = key
    here = found[key].time.step
    neighbours = {f"remat {other}": (mesh, other, micro, ticks) for other in candidates.REMAT if other != remat}
    for factor in (0.5, 2):
        neighbours[f"micro-batches x{factor:g}"] = (mesh, remat, round(micro * factor), ticks)
        neighbours[f"the pipeline's micro-batches x{factor:g}"] = (mesh, remat, micro, round(ticks * factor))
    for big, small in itertools.permutations(dict(mesh), 2):
        moved = _moved(dict(mesh), big, small)
        neighbours[f"{big} x2, {small} /2"] = (moved, remat, micro, ticks if "stage" in dict(moved) else 1)
    return {
        knob: found[other].time.step / here - 1 for knob, other in neighbours.items() if other in found and other != key
    }


def _moved(sizes: dict[str, int], big: str, small: str) -> Shape:
    sizes[big], sizes[small] = sizes[big] * 2, sizes[small] // 2
    return tuple((name, size) for name, size in sizes.items() if size > 1)
