"""The criteria of which a comparison's rule is made: written in its gin file before the runs, decided by them.

    comparison.Comparison.rule = (@image/rules.Lower(), @speed/rules.Above())
    image/rules.Lower.metric = 'train/loss_image'
    image/rules.Lower.arm = 'moma_4t4i'
    image/rules.Lower.than = 'dense'

A criterion compares runs of the same seed, which saw the same data in the same order, and looks at the 95 % t interval
of the paired difference over seeds: the criterion holds where the whole interval lies on the claim's side, does not
hold where it lies on the other, and cannot be told otherwise. Metric names are those of `maxlike.compare.metrics`;
arms are short names, such as 'dense' of 'papers/moma/dense'.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from maxlike.catalog import nearest
from maxlike.compare import metrics, statistics
from maxlike.compare.metrics import Value
from maxlike.errors import UserError

Values = Callable[[str, str], dict[int, Value]]
"""(metric, arm) -> its value for each seed."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the runs say of a criterion.

    effect: what was tested, in words. values: of each seed, the ends between which it lies. boundary, side: where the
    claim would have it. log: whether values, boundary and interval are logarithms. note: why it cannot be told, where
    that is not the spread, or what decided it, where that is no interval; else empty.
    """

    sentence: str
    effect: str
    side: Literal["below", "above"]
    boundary: float
    values: dict[int, tuple[float, float]]
    decision: statistics.Decision
    log: bool = False
    note: str = ""

    @property
    def outcome(self) -> statistics.Outcome:
        return self.decision.outcome


class Criterion:
    """What all criteria have beside `arms`, `sentence()` and `judge(values)`."""

    metric: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The metrics that it is decided by."""
        return (self.metric,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lower(Criterion):
    """The claim metric(arm) <= metric(than) - by.

    by: in the metric's unit, or with `relative` a share of metric(than), below 1. A negative one says "not worse than
    by so much". The claim holds strictly: arms that do not differ at all do not fulfil `by = 0`.
    Raises UserError for a metric of unknown kind, an arm compared with itself, and numbers without a meaning.
    """

    metric: str
    arm: str
    than: str
    by: float = 0.0
    relative: bool = False

    def __post_init__(self):
        _check_pair("Lower", self.metric, self.arm, self.than)
        if not math.isfinite(self.by) or (self.relative and self.by >= 1):
            limit = "a finite number below 1, a share" if self.relative else "a finite number"
            raise UserError(f"Lower.by={self.by}: it must be {limit}")

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.than

    def sentence(self) -> str:
        amount = f"{abs(self.by) * 100:.4g} %" if self.relative else f"{abs(self.by):.4g}"
        if self.by == 0:
            return f"{self.metric} of {self.arm} is lower than that of {self.than}"
        if self.by > 0:
            return f"{self.metric} of {self.arm} is lower than that of {self.than} by more than {amount}"
        return f"{self.metric} of {self.arm} is less than {amount} above that of {self.than}"

    def judge(self, values: Values) -> Judged:
        pairs = _pairs(values, self)
        form = _share if self.relative else _difference
        unit = f" as a share of {self.than}'s" if self.relative else ""
        effect = f"{self.metric}: {self.arm} - {self.than}{unit}"
        found = {seed: form(a, b) for seed, (a, b) in pairs.items()}
        return _judged(self.sentence(), effect, "below", -self.by, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio(Criterion):
    """The claim metric(arm) / metric(than) < below, tested on logarithms: of quantities that are positive and differ by
    factors, such as kurtosis. below: above 0. Refuses what Lower refuses."""

    metric: str
    arm: str
    than: str
    below: float

    def __post_init__(self):
        _check_pair("Ratio", self.metric, self.arm, self.than)
        if not 0 < self.below < math.inf:
            raise UserError(f"Ratio.below={self.below}: it must be above 0")

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.than

    def sentence(self) -> str:
        return f"{self.metric} of {self.arm} is less than {self.below:.4g} times that of {self.than}"

    def judge(self, values: Values) -> Judged:
        found = {seed: _log_ratio(a, b) for seed, (a, b) in _pairs(values, self).items()}
        effect = f"{self.metric}: {self.arm} / {self.than}"
        return dataclasses.replace(_judged(self.sentence(), effect, "below", math.log(self.below), found), log=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Above(Criterion):
    """The claim metric(arm) > value. A run that diverged counts as infinitely far below. Refuses a metric of unknown
    kind and a value that is not finite."""

    metric: str
    arm: str
    value: float

    def __post_init__(self):
        _check_single("Above", self.metric, self.value)

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    def sentence(self) -> str:
        return f"{self.metric} of {self.arm} is above {self.value:.4g}"

    def judge(self, values: Values) -> Judged:
        found = {seed: (_worst(v.low), _worst(v.high)) for seed, v in values(self.metric, self.arm).items()}
        return _judged(self.sentence(), f"{self.metric} of {self.arm}", "above", self.value, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Below(Criterion):
    """The claim metric(arm) < value. Refuses a metric of unknown kind and a value that is not finite."""

    metric: str
    arm: str
    value: float

    def __post_init__(self):
        _check_single("Below", self.metric, self.value)

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,)

    def sentence(self) -> str:
        return f"{self.metric} of {self.arm} is below {self.value:.4g}"

    def judge(self, values: Values) -> Judged:
        found = {seed: (v.low, v.high) for seed, v in values(self.metric, self.arm).items()}
        return _judged(self.sentence(), f"{self.metric} of {self.arm}", "below", self.value, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainsMore(Criterion):
    """The claim that `arm` gains more over `than` on `metric` than on `other`, two metrics of one unit that are better
    when lower: metric(than) - metric(arm) > other(than) - other(arm). Refuses what Lower refuses, and one metric twice.
    """

    metric: str
    other: str
    arm: str
    than: str

    def __post_init__(self):
        _check_pair("GainsMore", self.metric, self.arm, self.than)
        metrics.parse(self.other)
        if self.metric == self.other:
            raise UserError(f"GainsMore.metric and GainsMore.other are both {self.metric!r}: name two metrics")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.metric, self.other

    @property
    def arms(self) -> tuple[str, ...]:
        return self.arm, self.than

    def sentence(self) -> str:
        return f"{self.arm} gains more over {self.than} on {self.metric} than on {self.other}"

    def judge(self, values: Values) -> Judged:
        ours, theirs = _pairs(values, self), _pairs(values, self, self.other)
        found = {}
        for seed in sorted(ours.keys() & theirs.keys()):
            (low, high), (other_low, other_high) = _difference(*ours[seed]), _difference(*theirs[seed])
            found[seed] = low - other_high, high - other_low
        effect = f"{self.metric}: {self.arm} - {self.than}, less the same of {self.other}"
        return _judged(self.sentence(), effect, "below", 0.0, found)


def check_arms(rule: Sequence[Criterion], arms: Sequence[str]) -> None:
    """Raises UserError where a criterion names an arm (short name) that the comparison does not have."""
    for criterion in rule:
        for arm in criterion.arms:
            if arm not in arms:
                raise UserError(
                    f"the rule '{criterion.sentence()}' names the arm {arm!r}, which the comparison does not have"
                    f"{nearest(arm, arms)}; it has {', '.join(arms)}"
                )


def _check_pair(owner: str, metric: str, arm: str, than: str) -> None:
    metrics.parse(metric)
    if arm == than:
        raise UserError(f"{owner}.arm and {owner}.than are both {arm!r}: name two arms")


def _check_single(owner: str, metric: str, value: float) -> None:
    metrics.parse(metric)
    if not math.isfinite(value):
        raise UserError(f"{owner}.value={value}: it must be a finite number")


def _pairs(values: Values, criterion: Criterion, metric: str | None = None) -> dict[int, tuple[Value, Value]]:
    """Of criterion.metric, or another."""
    arm, than = criterion.arms
    ours, theirs = (values(criterion.metric if metric is None else metric, name) for name in (arm, than))
    return {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def _difference(a: Value, b: Value) -> tuple[float, float]:
    return a.low - b.high, a.high - b.low


def _share(a: Value, b: Value) -> tuple[float, float]:
    if not b.low > 0:
        return math.nan, math.nan
    if math.isinf(b.low):  # than diverged
        return (math.nan, math.nan) if math.isinf(a.high) else (-math.inf, -math.inf)
    return a.low / b.high - 1, a.high / b.low - 1


def _log_ratio(a: Value, b: Value) -> tuple[float, float]:
    if not (a.low > 0 and b.low > 0):
        return math.nan, math.nan
    return math.log(a.low) - math.log(b.high), math.log(a.high) - math.log(b.low)


def _worst(value: float) -> float:
    return -math.inf if value == math.inf else value


def _judged(
    sentence: str, effect: str, side: Literal["below", "above"], boundary: float, found: dict[int, tuple[float, float]]
) -> Judged:
    lows, highs = [low for low, _ in found.values()], [high for _, high in found.values()]
    decision = statistics.decide(lows, highs, boundary, side)
    note = _note(lows + highs, len(found), decision.outcome)
    return Judged(sentence, effect, side, boundary, dict(sorted(found.items())), decision, note=note)


def _note(ends: Sequence[float], n: int, outcome: statistics.Outcome) -> str:
    if outcome != "cannot tell":
        return "one side diverged at every seed" if all(math.isinf(end) for end in ends) else ""
    if n < 2:
        return "one seed says nothing of the spread" if n else "no seed has finished"
    if any(math.isnan(end) for end in ends):
        return "a value of some seed is unknown, or not positive where a ratio was asked"
    if any(math.isinf(end) for end in ends):
        return f"runs diverged, and not in the same way for at least {statistics.INFINITE_PAIRS} seeds"
    return ""
