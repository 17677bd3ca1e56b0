"""Which meshes, remat policies and micro-batches `--search` looks at."""

import math
from collections.abc import Iterator

from maxlike.experiment import Experiment
from maxlike.one_f_one_b import OneFOneB
from maxlike.plan.changes import with_mesh, with_pipeline
from maxlike.plan.compiled import trace_step
from maxlike.plan.layouts import Shares, abstract_layout
from maxlike.refusals import is_refusal
from maxlike.sharding import flat_axes

REMAT = ("none", "matmul_half", "full")
# Tensor parallel beyond the fast domain never wins (arXiv 2312.12705); on a torus beyond 16 neither.
WIDEST = 16
# A stage more costs bubble, or micro-batches of fewer rows to make up for it.
DEEPEST = 16
# Tokens of a row that a device keeps where its length is cut: products are at their best from here on (`estimate`), ...
SHORTEST = 2048
# ... and where there are more devices than rows, so that something must be cut, down to here.
SHORTEST_OF_FEW = 128


def refusal(experiment: Experiment, devices: int, platform: str) -> str | None:
    """The sentence with which a rule or a layer refuses a step of the experiment on its mesh; None: it can be run."""
    try:
        layout = abstract_layout(experiment, devices)
        trace_step(experiment, layout, platform)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return str(error)
    return None


def meshes(experiment: Experiment, devices: int, platform: str) -> Iterator[dict[str, int]]:
    """Shapes over stage, data, fsdp, expert (with experts), context and tensor, in the order from the slowest links to
    the fastest; those that cut the rows first.

    stage: powers of two up to DEEPEST that divide the periods of the layers. context: powers of two that leave a device
    SHORTEST tokens of a row, or SHORTEST_OF_FEW where there are more devices than rows. The experiment's own sizes of
    both besides. None of an axis without a rule, or that the network refuses by itself.
    """
    axes = {axis for weight in flat_axes(experiment.abstract_model().axes).values() for axis in weight}
    shortest = SHORTEST if devices <= experiment.batch_size else SHORTEST_OF_FEW
    longest = experiment.sequence_length // shortest
    stages = _sizes(experiment, "stage", "layers", DEEPEST, platform)
    periods = experiment.bare().stack.repeats
    least = 2 if one_f_one_b(experiment) else 1
    stages = [stage for stage in stages if stage >= least and periods % stage == 0]
    contexts = _sizes(experiment, "context", "length", longest, platform)
    for stage, context in ((s, c) for s in stages for c in contexts if devices % (s * c) == 0):
        left = devices // stage // context
        for tensor in (n for n in divisors(left) if n <= WIDEST):
            for expert in divisors(left // tensor) if "experts" in axes else (1,):
                for fsdp in divisors(left // tensor // expert):
                    data = left // tensor // expert // fsdp
                    sizes = {"stage": stage, "data": data, "fsdp": fsdp, "expert": expert}
                    sizes |= {"context": context, "tensor": tensor}
                    yield {name: size for name, size in sizes.items() if size > 1} or {"data": 1}


def _sizes(experiment: Experiment, name: str, logical: str, most: int, platform: str) -> list[int]:
    """Sizes of a mesh axis on which a logical axis lies: powers of two up to `most`, and the experiment's own."""
    own = max(experiment.mesh.shape.get(name, 1), 1)
    sizes = {1, own} | {2**i for i in range(1, most.bit_length())}
    if len(sizes) == 1 or name not in (experiment.mesh.rules.get(logical) or ()):
        return [1]
    shape, ticks = {name: max(own, 2)}, own_ticks(experiment)
    if one_f_one_b(experiment):
        shape = {"stage": max(experiment.mesh.shape.get("stage", 1), 2)} | shape
    devices = math.prod(shape.values())
    alone = with_mesh(experiment, shape).changed(batch_size=devices * (ticks or 1) * experiment.step.micro_batches)
    if name == "stage" and ticks is None:
        alone = with_pipeline(alone, 1)
    return [1] if refusal(alone, devices, platform) is not None else sorted(sizes)


def one_f_one_b(experiment: Experiment) -> bool:
    """Whether the experiment has a schedule that has no step without stages."""
    return isinstance(experiment.step.gradients, OneFOneB)


def own_ticks(experiment: Experiment) -> int | None:
    """Micro-batches of the experiment's own pipeline, whose knobs stay as they are; None where it has none."""
    if one_f_one_b(experiment):
        return experiment.step.gradients.micro_batches
    pipeline = experiment.bare().stack.pipeline
    return None if pipeline is None else pipeline.micro_batches


def micro_batches(experiment: Experiment, shares: Shares) -> list[int]:
    """Of `Step`: powers of two, and the experiment's own, that leave whole rows on every device."""
    wanted = {2**i for i in range(10)} | {experiment.step.micro_batches}
    return sorted(m for m in wanted if experiment.batch_size % (m * shares.batch) == 0)


def ticks(experiment: Experiment, shares: Shares, micro: int, own: int | None) -> list[int]:
    """Micro-batches of a pipeline: `own`, those of the experiment's own; where it has none 4, 8 and 16 a stage (bubbles
    of less than 1/5, 1/9, 1/17), or where the rows are too few the most that they allow. [1] without stages."""
    if shares.stage == 1:
        return [1]
    rows = experiment.batch_size // micro  # all other devices have a part of each
    others = shares.batch // shares.stage
    wanted = [times * shares.stage for times in (16, 8, 4, 2, 1)] if own is None else [own]
    fitting = [count for count in wanted if rows % (count * others) == 0]
    return [count for count in fitting if own is not None or count >= 4 * shares.stage] or fitting[:1]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
