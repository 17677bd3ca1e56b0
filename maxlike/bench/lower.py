"""Seconds to trace and lower a deep model, and to compile it, by depth."""

import itertools
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from maxlike import config
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word, random_batch
from maxlike.experiment import Experiment
from maxlike.program import Program

DEPTHS = (8, 64)


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """A training step of llama_1b's blocks at depths 8 and 64, scanned; `repeats` times each. The experiment and steps
    say nothing here. Nothing is run, and nothing comes from the cache of compiled programs."""
    lowering, compiling = {depth: [] for depth in DEPTHS}, {depth: [] for depth in DEPTHS}
    cached = jax.config.jax_enable_compilation_cache
    _use_cache(False)
    try:
        for _, depth in itertools.product(range(repeats), DEPTHS):
            traced, compiled = _seconds(depth)
            lowering[depth].append(traced)
            compiling[depth].append(compiled)
    finally:
        _use_cache(cached)
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


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # whether it is used is asked once, else


def _seconds(depth: int) -> tuple[float, float]:
    """(to trace and lower, to compile) the step of a network so deep."""
    bindings = (f"stack.Stack.depth = {depth}", "stack.Stack.scan = True")
    made = config.load("llama_1b", overlays=["austen", "mesh/single"], bindings=bindings)
    batch = random_batch(made, made.bare().vocab)
    began = time.perf_counter()
    lowered = Program.of(made, made.mesh.open()).lower_step(batch)
    between = time.perf_counter()
    lowered.compile()
    return between - began, time.perf_counter() - between
