"""Two records of what a program computed, tensor by tensor, and the first of them that departs."""

import dataclasses
from collections.abc import Sequence
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
# Two programs round at every operation, a move rounds the parameters once. Two meshes of linear attention 7 layers deep
# were up to 0.6 times as far apart as the furthest of three moves, of Mamba-2 18 layers deep up to as far; in float64
# they agree to 2e-13. Gradients rounded to bfloat16 lie 200 times as far.
MOVES = 4.0
BLUNT = 1e-3  # no move excuses more: what bfloat16 loses, 2^-9, must depart of any twin


@dataclasses.dataclass(frozen=True)
class Comparison:
    """largest: difference of a tensor over its magnitude, inf where it is missing, of another shape or dtype or not a
    number. tolerance: what it may be. Both are of the tensor that differs most, among those that depart if any does.
    first: the tensor that departs first, with both of its values, or None. remark: why it may differ by more than was
    asked, or "".
    """

    largest: float
    tolerance: float
    first: str | None
    remark: str = ""


def compare(one: Record, other: Record, tolerance: float, moved: Sequence[Record] = ()) -> Comparison:
    """Compares every tensor of two records; `other` is the one to trust. tolerance 0: every bit must agree.

    moved: `other` computed anew, each time from parameters moved by their last bit. No program in float32 is nearer to
    the truth than that, for it has rounded as much by its first operation: a tensor that they move by m may differ by
    MOVES m where that is more than the tolerance, and by no more than BLUNT.
    """
    first, found = None, [(False, 0.0, tolerance, "")]
    for section in other | one:
        a, b = one.get(section, {}), other.get(section, {})
        floor = 1.0 if section.startswith(METRICS) else FLOOR * max((_largest(x) for x in b.values()), default=0.0)
        for name in b | a:
            difference, told = _difference(a.get(name), b.get(name), floor, tolerance == 0.0)
            again = [_difference(record[section][name], b[name], floor, False)[0] for record in moved if name in b]
            furthest = max(again, default=0.0)
            allowed = max(tolerance, min(MOVES * furthest, BLUNT))
            why = f"a bit of the parameters moves {section}: {name} by {furthest:.1e}" if allowed > tolerance else ""
            found.append((difference > allowed, difference, allowed, why))
            if difference > allowed and first is None:
                first = f"{section}: {name} ({told})"
    _, largest, allowed, why = max(found, key=lambda one: one[:2])
    return Comparison(largest, allowed, first, why)


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
