"""A step compiled ahead of time: what the compiler says of its memory and its collectives. Nothing is allocated."""

import dataclasses
import re
import time

import jax
import numpy as np

from layers import kernels
from maxlike.collectives import Collective, collectives
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan.changes import on_device
from maxlike.plan.trace import abstract_batch
from maxlike.program import Program
from maxlike.sharding import Layout

_TOO_LARGE = re.compile(r"total memory required for (?:HLO )?temporaries \(([\d.]+)([KMG])\)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """arguments, outputs, aliased, temporary: bytes of one device, from the compiler. kernels: (operation,
    implementation, reason) as traced. seconds: of tracing and lowering, and of compiling. text: the program."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    collectives: tuple[Collective, ...]
    kernels: tuple[tuple[str, str, str], ...]
    seconds: tuple[float, float]
    text: str

    @property
    def peak(self) -> int:
        """Arguments, and outputs that do not take the place of arguments, and temporaries."""
        return self.arguments + self.outputs - self.aliased + self.temporary


def trace_step(experiment: Experiment, layout: Layout, platform: str) -> None:
    """Traces the step that `compile_step` would compile, on a layout whose devices need not be there.

    Raises what layers and rules refuse, as they do in a run: UserError, or a ValueError of layers/.
    """
    batch = abstract_batch(experiment, experiment.batch_size)
    with kernels.compile_for(platform), kernels.choose("layers", "scan"):
        Program.of(on_device(experiment), layout).trace_step(batch)


class DoesNotFit(Exception):
    """The compiler gave up for lack of memory. needed: bytes of temporaries that it says it needs, or None."""

    def __init__(self, needed: float | None, sentence: str):
        super().__init__(sentence)
        self.needed = needed


def compile_step(experiment: Experiment, layout: Layout, platform: str) -> Compiled:
    """Compiles the step of the experiment for the devices of `layout`, its layers scanned.

    Raises DoesNotFit where the compiler finds too little memory, UserError for a layout that does not fit.
    """
    shapes = abstract_batch(experiment, experiment.batch_size)
    # Broadcast views of one zero: the whole batch may be larger than this machine's memory.
    batch = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in shapes.items()}
    kernels.forget()
    began = time.monotonic()
    with kernels.compile_for(platform), kernels.choose("layers", "scan"):
        lowered = Program.of(experiment, layout).lower_step(batch)
    chosen = tuple(kernels.report())
    lowered_at = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_needed(str(error)), str(error).split("RESOURCE_EXHAUSTED: ")[-1].splitlines()[0]) from None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None:
        raise UserError(f"the compiler for {platform} does not tell what memory a program needs: plan with --hardware")
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        collectives=tuple(collectives(text, layout.mesh)),
        kernels=chosen,
        seconds=(lowered_at - began, time.monotonic() - lowered_at),
        text=text,
    )


def _needed(message: str) -> float | None:
    found = _TOO_LARGE.search(message)
    return float(found[1]) * {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}[found[2]] if found else None
