"""What a compiled step computes from some starts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from maxlike.check.compare import METRICS, Record, by_depth
from maxlike.convert.structure import Structure
from maxlike.program import Program


def records(
    program: Program, step: jax.stages.Compiled, starts: Iterable[dict], batches: Sequence[dict[str, np.ndarray]]
) -> Iterator[Record]:
    """For each start, the metrics, gradients and buffers of each step over the batches, and the parameters at the end.
    The program's optimizer is the Recorder."""
    structure = Structure(program.experiment.bare())
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    for start in starts:
        state, record = jax.device_put(start, program.shardings), {}
        for number, batch in enumerate(batches, 1):
            state, metrics = step(state, program.put(batch), allow)
            order = sorted(metrics, key=lambda name: (name != "loss", name == "grad_norm", name))
            record[f"{METRICS} of step {number}"] = {name: np.asarray(metrics[name]) for name in order}
            record[f"gradients of step {number}"] = by_depth(state["opt"]["gradient"], structure)
            record[f"buffers after step {number}"] = by_depth(state["buffers"], structure, buffers=True)
        yield record | {"parameters at the end": by_depth(state["params"], structure)}


def moved_by_a_bit(params: Any, seed: int) -> Any:
    """Every number of a tree of float arrays moved to one of its two neighbours, drawn by the seed."""
    random = np.random.default_rng(seed)

    def move(p: np.ndarray) -> np.ndarray:
        return np.nextafter(p, np.where(random.random(p.shape) < 0.5, -np.inf, np.inf).astype(p.dtype))

    return jax.tree.map(move, params)
