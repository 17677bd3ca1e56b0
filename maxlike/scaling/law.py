"""Law: a fitted form with what is known about how well it is known."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from maxlike.errors import UserError
from maxlike.scaling import forms
from maxlike.scaling.forms import Form

LEVEL = 95.0  # per cent of an interval


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def record(self) -> dict[str, Any]:
        """As JSON; None is infinite."""
        fields = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True)
class Prediction(Interval):
    """What a law says y is at a point: of the law itself, so a single run scatters around it.

    extrapolated_by: the factor by which the point lies outside the fitted range, of the variable where it is largest;
    1 inside. variable: that variable, '' inside.
    """

    extrapolated_by: float
    variable: str

    def __str__(self) -> str:
        inside = "inside the fitted range"
        outside = f"EXTRAPOLATED: {self.variable} is {self.extrapolated_by:.3g} times outside the fitted range"
        return f"{super().__str__()}, {outside if self.extrapolated_by > 1 else inside}"


@dataclasses.dataclass(frozen=True)
class Law:
    """A form with fitted parameters.

    theta: [parameters], and replicates: [replicates, parameters] of the bootstrap, as `Form` lays them out. widen: the
    factor that few points widen intervals by. ranges: {variable: (lowest, highest) fitted}. points: number of distinct
    places; runs: of values fitted. r2: of log y. held_out: relative error |predicted / y - 1| of each place when it is
    left out of the fit, None where too few are left. huber: of the fit.
    """

    form: Form
    theta: np.ndarray
    replicates: np.ndarray
    widen: float
    ranges: dict[str, tuple[float, float]]
    points: int
    runs: int
    r2: float
    held_out: tuple[float, ...] | None
    huber: float

    @property
    def parameters(self) -> dict[str, Interval]:
        """{name: value and interval} as the formula writes them."""
        spread = self._interval(self.theta, self.replicates)
        low, value, high = (self.form.reported(theta) for theta in spread)
        # A divisor's exponent is the negative of the power, so its ends change places.
        ends = zip(self.form.parameters, value, np.minimum(low, high), np.maximum(low, high))
        return {name: Interval(float(v), float(a), float(b)) for name, v, a, b in ends}

    def predict(self, x: Mapping[str, float]) -> Prediction:
        """y at {variable: value}, with its interval and how far outside the fitted range that is."""
        for name in self.form.variables:
            if name not in x or not (math.isfinite(x[name]) and x[name] > 0):
                raise UserError(f"a prediction needs a positive {name}: give {', '.join(self.form.variables)}")
        unknown = sorted(set(x) - set(self.form.variables))
        if unknown:
            raise UserError(f"the law has no variable {unknown[0]!r}: it has {', '.join(self.form.variables)}")
        at = np.array([[x[name] for name in self.form.variables]])
        with np.errstate(over="ignore"):
            low, value, high = np.exp(self.curve(at))[:, 0]
        outside = {name: self._outside(name, x[name]) for name in self.form.variables}
        far = max(outside, key=outside.__getitem__)
        return Prediction(float(value), float(low), float(high), outside[far], far if outside[far] > 1 else "")

    def curve(self, x: np.ndarray) -> np.ndarray:
        """log y at x [points, variables]: [low, value, high] of each point."""
        log_x = np.log(x)
        return np.stack(self._interval(self.form.log_y(self.theta, log_x), self.form.log_y(self.replicates, log_x)))

    def _interval(self, value: np.ndarray, replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tail = (100 - LEVEL) / 2
        low, high = np.percentile(replicates, [tail, 100 - tail], axis=0)
        return value - self.widen * np.maximum(value - low, 0), value, value + self.widen * np.maximum(high - value, 0)

    def _outside(self, name: str, x: float) -> float:
        low, high = self.ranges[name]
        return max(1.0, x / high, low / x)

    def sentences(self, y: str = "y") -> list[str]:
        """The law for a person, with y's name."""
        lines = [f"{y}{str(self.form)[1:]}"]
        lines += [f"  {name} = {interval}" for name, interval in self.parameters.items()]
        fitted = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in self.ranges.items())
        lines.append(f"fitted to {self.points} points ({self.runs} runs), {fitted}; R^2 of log {y} {self.r2:.4f}")
        if self.held_out is None:
            lines.append("too few points to hold one out")
        else:
            error, worst = 100 * float(np.median(self.held_out)), 100 * max(self.held_out)
            lines.append(
                f"a point left out of the fit is predicted within {error:.2g} % (median), {worst:.2g} % (worst)"
            )
        return lines

    def record(self) -> dict[str, Any]:
        """As JSON, an infinite end of an interval as None; `of_record` reads it."""
        return dataclasses.asdict(self) | {
            "form": {"name": self.form.name, "variables": list(self.form.variables), "formula": str(self.form)},
            "parameters": {name: interval.record() for name, interval in self.parameters.items()},
            "theta": self.theta.tolist(),
            "replicates": self.replicates.tolist(),
            "huber": None if math.isinf(self.huber) else self.huber,
        }

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Law":
        """Raises UserError where the record is no law's."""
        try:
            held_out, huber = record["held_out"], record["huber"]
            return cls(
                form=forms.of_name(record["form"]["name"], tuple(record["form"]["variables"])),
                theta=np.array(record["theta"], float),
                replicates=np.array(record["replicates"], float),
                widen=float(record["widen"]),
                ranges={name: (float(low), float(high)) for name, (low, high) in record["ranges"].items()},
                points=record["points"],
                runs=record["runs"],
                r2=record["r2"],
                held_out=None if held_out is None else tuple(held_out),
                huber=math.inf if huber is None else huber,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this is no record of a law ({error}): fit one with `--job law`") from error
