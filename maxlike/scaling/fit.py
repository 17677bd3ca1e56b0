"""Fits a law to points: Huber loss on the residuals of log y, many starts, intervals by bootstrap.

The loss and the many starts are those of Hoffmann et al. (arXiv 2203.15556, appendix D.3): residuals that are large
against `huber` count by their size instead of its square, so that a run that went wrong does not bend the law.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm, t

from maxlike.errors import UserError
from maxlike.scaling.forms import Form
from maxlike.scaling.huber import Huber, finish, minimize_many
from maxlike.scaling.law import Law

EXPONENTS = (-3.0, -2.0, -1.0, -0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0)  # where the search starts
FINISHED = 6  # starts, the best after their descent, that are followed to the end
DISTINCT = 3  # values a variable needs before it may have an exponent
ATTEMPTS = 1000  # samples that a replicate may need until one determines the law


def fit(
    form: Form,
    x: Mapping[str, Sequence[float]],
    y: Sequence[float],
    *,
    huber: float = 1e-3,
    resample: Literal["points", "seeds"] = "points",
    replicates: int = 400,
    seed: int = 0,
) -> Law:
    """The law of that form through the points.

    x: {variable: values}, y: values, one a run; runs at the same x are seeds of one point, which counts once, with the
        mean of their log y. All positive.
    huber: size of a residual of log y from which on it counts by its size, > 0; math.inf is least squares.
    resample: what the bootstrap draws anew: 'points', or 'seeds' within each point, which leaves out how far the points
        are off the form. replicates: number of draws, >= 20. seed: of the draws.
    Intervals are the percentiles of the replicates, widened by sqrt(n / (n - p)) t / z for n things drawn and p numbers
    fitted to them: plain percentiles are too narrow where n is small (Hesterberg, The American Statistician 69, 2015,
    section 3).
    Raises UserError where there are no more points than parameters, fewer than three values of a variable, variables
    that move together, values that are not positive, or too few seeds to draw from.
    """
    log_x, log_y = _logs(form, x, y)
    if not huber > 0 or replicates < 20:
        raise UserError(f"huber={huber} must be positive and replicates={replicates} at least 20: correct them")
    u, cells = np.unique(log_x, axis=0, return_inverse=True)
    cells = cells.ravel()
    _refuse(form, u, cells, resample)
    runs = np.equal.outer(np.arange(len(u)), cells).astype(float)  # [points, runs]: which belong to which
    v = runs @ log_y / runs.sum(1)
    centre = (u.mean(0), float(v.mean()))
    u, v = u - centre[0], v - centre[1]
    loss = Huber(form, u, huber)
    theta = _search(loss, v)
    draws = np.random.default_rng(seed)
    if resample == "points":
        weights = np.stack([_points(u, draws) for _ in range(replicates)])
        targets, drawn, fitted = np.broadcast_to(v, weights.shape), len(u), len(form.parameters)
    else:
        taken = np.stack([_seeds(cells, draws) for _ in range(replicates)])  # [replicates, runs]
        targets = (taken * log_y) @ runs.T / (taken @ runs.T) - centre[1]
        weights, drawn, fitted = np.ones_like(targets), len(cells), len(u)
    many = minimize_many(loss, np.broadcast_to(theta, (replicates, len(theta))), weights, targets)
    free = drawn - fitted
    spread = float(np.sum(v**2))
    return Law(
        form=form,
        theta=form.shifted(theta, *centre),
        replicates=form.shifted(many, *centre),
        widen=math.sqrt(drawn / free) * float(t.ppf(0.975, free) / norm.ppf(0.975)),
        ranges={name: (float(min(x[name])), float(max(x[name]))) for name in form.variables},
        points=len(u),
        runs=len(cells),
        r2=1 - float(np.sum((form.log_y(theta, u) - v) ** 2)) / spread if spread else 1.0,
        held_out=_held_out(loss, v, theta),
        huber=huber,
    )


def _logs(form: Form, x: Mapping[str, Sequence[float]], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    missing = [name for name in form.variables if name not in x]
    if missing:
        raise UserError(f"the law of {', '.join(form.variables)} needs values of {missing[0]}: give them")
    columns = {name: np.asarray(x[name], float) for name in form.variables} | {"y": np.asarray(y, float)}
    for name, values in columns.items():
        if values.shape != columns["y"].shape:
            raise UserError(f"there are {values.size} values of {name} and {columns['y'].size} of y: give as many")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise UserError(
                f"{name} is {values[bad[0]]} in run {bad[0]}, and a power law is of positive numbers: leave the run out"
            )
    return np.log(np.stack([columns[name] for name in form.variables], 1)), np.log(columns["y"])


def _refuse(form: Form, log_x: np.ndarray, cells: np.ndarray, resample: str) -> None:
    points, wanted = len(log_x), len(form.parameters)
    if points <= wanted:
        raise UserError(
            f"{form} has {wanted} parameters and there are {points} points: {wanted + 1} is the least, "
            "run more of them or take a form with fewer parameters"
        )
    for name, column in zip(form.variables, log_x.T):
        values = len(np.unique(column))
        if values < DISTINCT:
            raise UserError(
                f"{name} has {values} values and an exponent needs {DISTINCT}: run more of them, or leave it out of --x"
            )
    if _rank(log_x) <= len(form.variables):
        raise UserError(f"{' and '.join(form.variables)} move together, so their exponents cannot be told apart")
    if resample == "seeds" and np.bincount(cells).min() < 2:
        raise UserError("resample='seeds' needs two runs or more at every point: run more seeds, or resample 'points'")


def _rank(log_x: np.ndarray) -> int:
    spread = log_x - log_x.mean(0)
    return 1 + int(np.linalg.matrix_rank(spread, tol=1e-6 * max(np.abs(spread).max(), 1e-300) * len(spread)))


def _search(loss: Huber, v: np.ndarray) -> np.ndarray:
    """The parameters of the best minimum from all starts: the starts descend together, and L-BFGS finishes the best."""
    starts, ones = _starts(loss.form, loss.u, v), np.ones(len(v))
    many = (len(starts), len(v))
    ends = minimize_many(loss, starts, np.ones(many), np.broadcast_to(v, many), iterations=60)
    order = np.argsort(loss.values(ends, ones, v))[:FINISHED]
    return min((finish(loss, ends[start], v) for start in order), key=lambda theta: loss.values(theta, ones, v))


def _starts(form: Form, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Least squares where the form is linear in its logarithm; else a grid of exponents, each with the prefactors that
    are best for it, a non-negative linear problem."""
    if form.log_linear:
        design = np.concatenate([np.ones((len(v), 1)), u], 1)
        return np.linalg.lstsq(design, v, rcond=None)[0][None]
    grids = [[e for e in EXPONENTS if e < 0 or not term.divides] for term in form.terms for _ in term.powers]
    starts, bounds = [], np.array(form.bounds()).T
    for exponents in itertools.product(*grids):
        theta, left = [], list(exponents)
        for term in form.terms:
            theta += [0.0] + [left.pop(0) for _ in term.powers]
        theta = np.array(theta)
        prefactors = np.flatnonzero(np.isin(form.parameters, [term.prefactor for term in form.terms]))
        terms = np.exp(np.clip(form.log_terms(theta, u) - v, -50, 50)).T  # relative to y, so that all points count
        theta[prefactors] = np.log(np.maximum(nnls(terms, np.ones(len(v)))[0], 1e-6))
        starts.append(np.clip(theta, *bounds))
    return np.stack(starts)


def _points(u: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """How often each point is in one bootstrap sample; samples that do not determine the law are drawn again."""
    for _ in range(ATTEMPTS):
        weights = np.bincount(draws.integers(0, len(u), len(u)), minlength=len(u)).astype(float)
        if _rank(u[weights > 0]) > u.shape[1]:
            return weights
    raise UserError("no bootstrap sample of these points determines the law: run more points")


def _seeds(cells: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """How often each run is in a sample that has as many runs of each point as there are."""
    taken = np.zeros(len(cells))
    for cell in np.unique(cells):
        runs = np.flatnonzero(cells == cell)
        taken[runs] = np.bincount(draws.integers(0, len(runs), len(runs)), minlength=len(runs))
    return taken


def _held_out(loss: Huber, v: np.ndarray, theta: np.ndarray) -> tuple[float, ...] | None:
    """Relative error of each point under the law of all others."""
    kept = ~np.eye(len(v), dtype=bool)
    if len(v) - 1 <= len(theta) or any(_rank(loss.u[rows]) <= loss.u.shape[1] for rows in kept):
        return None
    start = np.broadcast_to(theta, (len(v), len(theta)))
    without = minimize_many(loss, start, kept.astype(float), np.broadcast_to(v, kept.shape))
    return tuple(abs(math.expm1(float(off))) for off in np.diag(loss.form.log_y(without, loss.u)) - v)
