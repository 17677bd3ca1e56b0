"""The best values of knobs: where the paraboloid through the runs near the best one is lowest."""

from collections.abc import Mapping, Sequence

import numpy as np

from maxlike.errors import UserError


def optimum(knobs: Mapping[str, Sequence[float]], y: Sequence[float], *, within: float = 0.02) -> dict[str, float]:
    """{knob: value} at the minimum of y, a quadratic of the logarithms of one or two knobs fitted to the runs whose y
    is at most `within` (a share, > 0) above the lowest. The lowest run itself is known to half a step of the grid only.

    knobs: {name: values}, positive. y: a loss, lower is better. Raises UserError for other values, where the runs are
    too few or have too few values of a knob, do not curve upwards, or the minimum lies outside of what was tried.
    """
    names, losses = list(knobs), np.asarray(y, float)
    tried = np.stack([np.asarray(knobs[name], float) for name in names], 1)
    for name, values in zip(names, tried.T):
        if values.min() <= 0:
            raise UserError(
                f"{name} has the value {values.min():g}, and its optimum is looked for among positive numbers: leave "
                "such runs out with --where, or take another knob"
            )
    u = np.log(tried)
    near = losses <= losses.min() * (1 + within)
    pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
    wanted = 1 + len(names) + len(pairs)
    if len(np.unique(u[near], axis=0)) < wanted:
        raise UserError(
            f"{near.sum()} runs are within {100 * within:g} % of the best, and the optimum of {', '.join(names)} needs "
            f"{wanted} points: run more of them near it, or take a wider --within"
        )
    centre, spread = u[near].mean(0), np.maximum(u[near].std(0), 1e-12)
    v = (u[near] - centre) / spread
    design = np.stack([np.ones(len(v)), *v.T, *(v[:, i] * v[:, j] for i, j in pairs)], 1)
    if np.linalg.matrix_rank(design, tol=1e-6) < wanted:
        raise UserError(
            f"the runs within {100 * within:g} % of the best do not fix a paraboloid in {', '.join(names)}: it needs "
            "three values of each, not along one line; run more of them, or take a wider --within"
        )
    found = np.linalg.lstsq(design, losses[near], rcond=None)[0]
    slope, curvature = found[1 : 1 + len(names)], np.zeros((len(names), len(names)))
    for (i, j), value in zip(pairs, found[1 + len(names) :]):
        curvature[i, j] += value
        curvature[j, i] += value
    if np.linalg.eigvalsh(curvature).min() <= 0:
        raise UserError(
            f"the loss does not curve upwards in {', '.join(names)} near its best run: try values farther out"
        )
    best = np.linalg.solve(curvature, -slope) * spread + centre
    outside = [name for name, at, tried in zip(names, best, u.T) if not tried.min() <= at <= tried.max()]
    if outside:
        raise UserError(
            f"the best {outside[0]} is {np.exp(best[names.index(outside[0])]):.3g}, outside of the values tried: try "
            "values around it"
        )
    return {name: float(np.exp(at)) for name, at in zip(names, best)}
