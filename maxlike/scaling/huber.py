"""The Huber loss of a form on log y, and its minimum: one by L-BFGS, or many samples' together.

A bootstrap is hundreds of fits of a few numbers, of which one at a time is all overhead (0.1 s each): they descend
together, each with its own weights of the points.
"""

import math

import numpy as np
from scipy.optimize import minimize

from maxlike.scaling.forms import Form

SETTLED = 1e-10  # relative gain of the loss below which a descent has ended


class Huber:
    """sum of weight * H(log y predicted - log y); H(r) = r^2 / 2 up to |r| = delta, then delta (|r| - delta / 2).

    u: log x [points, variables]. delta: > 0, math.inf for least squares. Losses are in units of delta^2 (1e-6 for least
    squares). v, everywhere: log y [..., points].
    """

    def __init__(self, form: Form, u: np.ndarray, delta: float):
        self.form, self.u = form, u
        self.unit = delta if math.isfinite(delta) else 1e-3
        self.limit = delta / self.unit

    def values(self, theta: np.ndarray, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        """theta: [..., parameters]; weights: [..., points]; returns [...]."""
        return self._sum((self.form.log_y(theta, self.u) - v) / self.unit, weights)

    def value_and_gradient(self, theta: np.ndarray, v: np.ndarray) -> tuple[float, np.ndarray]:
        """Of one vector of parameters, with all weights 1."""
        log_y, slopes = self.form.log_y_and_slopes(theta, self.u)
        r = (log_y - v) / self.unit
        return float(self._sum(r, np.ones(len(r)))), slopes.T @ np.clip(r, -self.limit, self.limit) / self.unit

    def newton(self, theta: np.ndarray, weights: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient [..., p] and the curvature [..., p, p] of the parabolas that touch each point's loss from above."""
        log_y, slopes = self.form.log_y_and_slopes(theta, self.u)
        r = (log_y - v) / self.unit
        pull = weights * np.minimum(1.0, self.limit / np.maximum(np.abs(r), 1e-300))
        scaled = slopes / self.unit
        gradient = np.einsum("...np,...n->...p", scaled, pull * r)
        return gradient, np.einsum("...np,...n,...nq->...pq", scaled, pull, scaled)

    def _sum(self, r: np.ndarray, weights: np.ndarray) -> np.ndarray:
        size = np.abs(r)
        inside = np.minimum(size, self.limit)
        return np.sum(weights * inside * (size - 0.5 * inside), -1)


def finish(loss: Huber, theta: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The minimum that L-BFGS finds from `theta` with all weights 1."""
    options = {"maxiter": 300, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20}
    bounds = loss.form.bounds()
    found = minimize(loss.value_and_gradient, theta, (v,), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return found.x


def minimize_many(
    loss: Huber, theta: np.ndarray, weights: np.ndarray, v: np.ndarray, *, iterations: int = 300
) -> np.ndarray:
    """The minima near theta [many, parameters], each of its own weights and log y [many, points], by damped Newton
    steps that are taken only where the loss falls."""
    theta = np.array(theta)
    low, high = np.array(loss.form.bounds()).T
    damping = np.full(len(theta), 1e-6)
    value = loss.values(theta, weights, v)
    going = np.arange(len(theta))
    for _ in range(iterations):
        gradient, curvature = loss.newton(theta[going], weights[going], v[going])
        diagonal = np.einsum("...pp->...p", curvature)
        extra = damping[going, None] * (diagonal + 1e-12 * diagonal.max(-1, keepdims=True) + 1e-30)
        step = np.linalg.solve(curvature + extra[..., None] * np.eye(theta.shape[1]), gradient[..., None])[..., 0]
        candidate = np.clip(theta[going] - step, low, high)
        new = loss.values(candidate, weights[going], v[going])
        better = new < value[going]
        gain = np.where(better, value[going] - new, 0.0)
        small = better & (gain <= SETTLED * np.maximum(new, 1e-12))
        theta[going[better]], value[going[better]] = candidate[better], new[better]
        damping[going] = np.where(better, np.maximum(damping[going] / 5, 1e-9), damping[going] * 8)
        going = going[~small & (damping[going] < 1e9)]
        if not going.size:
            break
    return theta
