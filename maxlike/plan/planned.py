"""A plan: an experiment on a target, what it needs and how long it takes."""

import dataclasses

from maxlike.collectives import Collective
from maxlike.experiment import Experiment
from maxlike.plan import estimate, layouts, memory, traffic
from maxlike.plan.changes import on_device
from maxlike.plan.compiled import Compiled, DoesNotFit, compile_step
from maxlike.plan.targets import Target
from maxlike.plan.trace import Trace
from maxlike.program import Program

# Of a device's memory, what an analytic plan leaves for workspace and fragmentation. A plan that the compiler for the
# device itself has made needs none.
MARGIN = 0.08


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment on a target.

    memory, collectives, time: by formula, or of the compiler's collectives where something was compiled. time: None
    where the target's speed is not known. compiled: of the compiler, None without it. refused: why it gave up.
    """

    experiment: Experiment
    target: Target
    shares: layouts.Shares
    trace: Trace
    memory: memory.Memory
    collectives: tuple[Collective, ...]
    time: estimate.Time | None
    compiled: Compiled | None = None
    refused: DoesNotFit | None = None

    @property
    def remat(self) -> str:
        return self.trace.remat

    @property
    def devices(self) -> int:
        return self.shares.layout.mesh.size

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.experiment.batch_size * self.experiment.sequence_length

    @property
    def peak(self) -> float:
        """Bytes of one device, the compiler's where it has said them."""
        if self.compiled is not None:
            return self.compiled.peak
        if self.refused is not None and self.refused.needed is not None:
            return self.memory.arguments + self.refused.needed
        return self.memory.peak

    @property
    def limit(self) -> float | None:
        """Bytes that one device may use; None where that is not known."""
        if self.target.device is None:
            return None
        exact = self.target.platform == "tpu" and (self.compiled or self.refused)
        return self.target.device.memory * (1 if exact else 1 - MARGIN)

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.peak <= self.limit and self.refused is None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.time is None else self.tokens / self.time.step

    @property
    def mfu(self) -> float | None:
        """By the convention of `maxlike.mfu`, 0 to 1."""
        if self.time is None:
            return None
        return self.tokens_per_second * self.trace.flops_per_token / (self.target.device.peak * self.devices)


def analytic(experiment: Experiment, target: Target, traced: Trace, at: "Placed | None" = None) -> Plan:
    """A plan by formula alone. at: the layout's part of it, where another plan on the same mesh has it.
    Raises UserError for a mesh that does not fit the experiment."""
    at = Placed.of(experiment, target.count) if at is None else at
    at.shares.layout.check_rows(experiment.batch_size // experiment.step.micro_batches)
    predicted = memory.predict(experiment, at.state, at.shares, traced, target.platform, traced.remat)
    found = tuple(traffic.predict(experiment, at.shares, traced, target.platform, traced.remat))
    return _timed(Plan(experiment, target, at.shares, traced, predicted, found, None), found)


@dataclasses.dataclass(frozen=True)
class Placed:
    """What an experiment's state is on a mesh, whatever its remat and micro-batches."""

    shares: layouts.Shares
    state: memory.State
    program: Program

    @classmethod
    def of(cls, experiment: Experiment, devices: int, other: "Placed | None" = None) -> "Placed":
        """other: of the same experiment on another mesh, whose state is not traced again.
        Raises UserError where the mesh does not fit the experiment."""
        layout = layouts.abstract_layout(experiment, devices)
        program = Program.of(on_device(experiment), layout) if other is None else other.program.on(layout)
        state = memory.State.of(program, experiment.step.moments.memory != "device")
        return cls(layouts.Shares(experiment, layout), state, program)

    def with_ticks(self, ticks: int) -> "Placed":
        """The same with so many micro-batches in its pipeline."""
        return dataclasses.replace(self, shares=self.shares.with_ticks(ticks))


def _timed(plan: Plan, found: tuple[Collective, ...]) -> Plan:
    device = plan.target.device
    if device is None:
        return dataclasses.replace(plan, collectives=found)
    links = estimate.Links(
        device, plan.shares.sizes, plan.experiment.mesh.outer(plan.shares.sizes, plan.target.slices), plan.target.torus
    )
    time = estimate.predict(plan.experiment, plan.shares, plan.trace, plan.memory, found, links)
    return dataclasses.replace(plan, collectives=found, time=time)


def compile_plan(plan: Plan) -> Plan:
    """The same plan with what the compiler for its target says."""
    layout = plan.experiment.mesh.open(plan.target.devices)
    try:
        result = compile_step(plan.experiment, layout, plan.target.platform)
    except DoesNotFit as refused:
        return dataclasses.replace(plan, refused=refused)
    return dataclasses.replace(_timed(plan, result.collectives), compiled=result)
