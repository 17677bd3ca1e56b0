"""Two records of what a program computed, tensor by tensor, and the first of them that departs."""

import dataclasses
from typing import Any

import numpy as np

from maxlike import checkpoint_tree
from maxlike.convert.structure import Structure

# {section: {name: array}}, both in order of depth: what comes first in a section is computed first.
Record = dict[str, dict[str, np.ndarray]]

# A tensor is measured by its largest number, but by no less than this share of the largest of its section: what cancels
# out (the gradient of a key's bias) is rounding alone. Metrics have units of their own and are measured by 1 or more.
FLOOR = 0.05
METRICS = "metrics"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """largest: difference of any tensor over its magnitude, inf where one is missing, of another shape or dtype or not
    a number. tolerance: what it may be. first: the tensor that departs first, with both of its values, or None."""

    largest: float
    tolerance: float
    first: str | None


def compare(one: Record, other: Record, tolerance: float) -> Comparison:
    """Compares every tensor of two records; `other` is the one to trust. tolerance 0: every bit must agree."""
    largest, first = 0.0, None
    for section in other | one:
        a, b = one.get(section, {}), other.get(section, {})
        floor = 1.0 if section.startswith(METRICS) else FLOOR * max((_largest(x) for x in b.values()), default=0.0)
        for name in b | a:
            difference, told = _difference(a.get(name), b.get(name), floor, tolerance == 0.0)
            largest = max(largest, difference)
            if difference > tolerance and first is None:
                first = f"{section}: {name} ({told})"
    return Comparison(largest, tolerance, first)


def by_depth(tree: Any, structure: Structure, *, buffers: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a tree shaped like the parameters (or the buffers), one a layer, in order of depth."""
    flat = {path: np.asarray(leaf) for path, leaf in checkpoint_tree.flatten(tree).items()}
    return {
        path: flat[parameter.leaf][parameter.index]
        for path, parameter in structure.parameters.items()
        if parameter.buffer == buffers
    }


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x.astype(np.float64)), initial=0.0))


def _difference(a: np.ndarray | None, b: np.ndarray | None, floor: float, bits: bool) -> tuple[float, str]:
    """(relative difference, how the two read)."""
    if a is None or b is None:
        return np.inf, "missing " + ("here" if a is None else "there")
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf, f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    if np.array_equal(a, b, equal_nan=bits and np.issubdtype(b.dtype, np.inexact)):
        return 0.0, ""
    x, y = a.astype(np.float64), b.astype(np.float64)
    apart = np.abs(x - y)
    if not np.isfinite(apart).all():
        return np.inf, "not a number"
    place = np.unravel_index(np.argmax(apart), apart.shape)
    magnitude = max(_largest(b), floor)
    return float(apart[place] / magnitude) if magnitude else np.inf, f"{x[place]:.6g} against {y[place]:.6g}"
