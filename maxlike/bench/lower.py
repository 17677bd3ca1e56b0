"""Seconds to trace and lower a deep model, and to compile it, by depth."""

import time

from maxlike import config
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word, random_batch
from maxlike.experiment import Experiment
from maxlike.program import Program

DEPTHS = (8, 64)


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """A training step of llama_1b's blocks at depths 8 and 64, scanned; `repeats` times each. The experiment and steps
    say nothing here. Nothing is run, and a cache of compiled programs would be measured if one were on: turn it off."""
    lowering, compiling = {depth: [] for depth in DEPTHS}, {depth: [] for depth in DEPTHS}
    for _ in range(repeats):
        for depth in DEPTHS:
            bindings = (f"stack.Stack.depth = {depth}", "stack.Stack.scan = True")
            made = config.load("llama_1b", overlays=["austen", "mesh/single"], bindings=bindings)
            batch = random_batch(made, made.bare().vocab)
            began = time.perf_counter()
            lowered = Program.of(made, made.mesh.open()).lower_step(batch)
            lowering[depth].append(time.perf_counter() - began)
            began = time.perf_counter()
            lowered.compile()
            compiling[depth].append(time.perf_counter() - began)
    least, most = DEPTHS
    growth = [b / a for a, b in zip(compiling[least], compiling[most], strict=True)]
    return Result(
        "lower",
        device_word(),
        [
            Quantity(f"trace and lower, {most} layers", "s", lowering[most], "< 15"),
            Quantity(f"trace and lower, {least} layers", "s", lowering[least]),
            Quantity(f"compile, {most} layers / {least} layers", "", growth, "<= 1.2"),
            Quantity(f"compile, {most} layers", "s", compiling[most]),
        ],
    )
