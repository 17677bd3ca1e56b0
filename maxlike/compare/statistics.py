"""Paired differences over seeds: Student's t interval, how many seeds a decision would take, and the decision."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import stats

LEVEL = 0.95
MOST_SEEDS = 1000  # beyond these, a difference is as good as none
# One run that diverged is infinitely worse than another; so many pairs, all the same way, have less than 2.5 % chance
# ((1/4)^3, both arms equally likely to diverge) to come from equal arms. Fewer, or both ways, decide nothing.
INFINITE_PAIRS = 3

Outcome = Literal["holds", "does not hold", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """mean: of the values. low, high: ends of the 95 % interval of their expectation, infinite where nothing can be
    said. sd: sample standard deviation, NaN where there is none. n: values."""

    mean: float
    low: float
    high: float
    sd: float
    n: int

    def without(self, boundary: float) -> bool:
        """Whether the whole interval lies to one side of the boundary."""
        return self.high < boundary or self.low > boundary


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean. Of one value, and where some are infinite or NaN, it is the whole line; of at
    least three values that are all the same infinity, that infinity."""
    x = np.asarray(values, np.float64)
    n = len(x)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf, math.nan, 0)
    if not np.isfinite(x).all():
        one_way = n >= INFINITE_PAIRS and (np.isposinf(x).all() or np.isneginf(x).all())
        if one_way:
            return Interval(x[0].item(), x[0].item(), x[0].item(), math.nan, n)
        mean = x[0].item() if (x == x[0]).all() else math.nan
        return Interval(mean, -math.inf, math.inf, math.nan, n)
    mean = math.fsum(x) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, math.nan, 1)
    # Equal values have no spread; their rounded mean must not make one.
    sd = 0.0 if (x == x[0]).all() else float(np.std(x, ddof=1))
    mean = x[0].item() if sd == 0.0 else mean
    half = half_width(sd, n)
    return Interval(mean, mean - half, mean + half, sd, n)


def half_width(sd: float, n: int) -> float:
    """Of the t interval of n >= 2 values with this sample standard deviation."""
    return _quantile(n) * sd / math.sqrt(n)


@functools.cache
def _quantile(n: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1))


def seeds_needed(sd: float, distance: float) -> int | None:
    """The smallest number of seeds whose expected half width, at this standard deviation, is below the distance of the
    mean from the boundary; None where it is more than 1000, or nothing is known of the spread."""
    if not math.isfinite(sd) or not math.isfinite(distance) or distance == 0:
        return None
    return next((n for n in range(2, MOST_SEEDS + 1) if half_width(sd, n) < abs(distance)), None)


@dataclasses.dataclass(frozen=True)
class Decision:
    """outcome; the interval it was read from; seeds_needed: in all, for a decision either way at the observed mean and
    spread, None where it is more than 1000 or cannot be said."""

    outcome: Outcome
    interval: Interval
    seeds_needed: int | None


def decide(lows: Sequence[float], highs: Sequence[float], boundary: float, side: Literal["below", "above"]) -> Decision:
    """Whether the expectation of values lies on a side of the boundary.

    lows, highs: the ends between which each value is known to lie, equal where it is known: a value that is known by a
    bound alone (such as a speed-up that was not reached) decides only what all it may be would decide.
    Holds where the whole interval lies strictly on that side, does not hold where it lies strictly on the other:
    arms that do not differ at all never win.
    """
    low, high = interval(lows), interval(highs)
    middle = (low.mean + high.mean) / 2
    sd = max(low.sd, high.sd) if not math.isnan(low.sd + high.sd) else math.nan
    found = Interval(middle, low.low, high.high, sd, low.n)
    is_below, is_above = found.high < boundary, found.low > boundary
    if not (is_below or is_above):
        return Decision("cannot tell", found, seeds_needed(sd, middle - boundary))
    holds = is_below if side == "below" else is_above
    return Decision("holds" if holds else "does not hold", found, seeds_needed(sd, middle - boundary))


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Of a conjunction: it holds if all do, and does not hold if one does not."""
    if "does not hold" in outcomes:
        return "does not hold"
    return "holds" if outcomes and all(outcome == "holds" for outcome in outcomes) else "cannot tell"
