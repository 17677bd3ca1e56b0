"""Named values of finished runs, read from their metrics.jsonl.

    train/KEY        mean of KEY over the last tenth of the training steps
    train/KEY/area   mean over all steps: the area under the curve, a step being one wide
    validation/KEY   the last validation value
    measured/KEY     what a tool measured after the last step
    eta/KEY          FLOPs the baseline spent to reach its final smoothed training KEY, divided by those this arm needed
                     to reach the same (MoMa, arXiv 2407.21770: the speed-up)
    spikes/KEY       training steps whose value is more than 0.5 above the mean of the 20 before, or not finite

KEY is a name on the lines of metrics.jsonl, such as `loss`, `loss/image` or `bits_per_byte`; of a list, one number a
layer, `name/03`. A step whose value is not finite, which the guard drops, is left out of a mean unless it is one of
most. Every metric of a run that diverged is infinite, but for eta: it never reached.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from maxlike.catalog import nearest
from maxlike.errors import UserError
from maxlike.report.records import read, running_mean

KINDS = ("train", "validation", "measured", "eta", "spikes")
SMOOTHED = 20  # curves are the mean over the last 1/20 of the baseline's steps
SPIKE = 0.5  # in the metric's unit
SPIKE_MEMORY = 20  # steps


@dataclasses.dataclass(frozen=True)
class Name:
    """A metric's name in its parts."""

    kind: str
    key: str
    area: bool = False


def parse(metric: str) -> Name:
    """Raises UserError for a name of no known kind."""
    kind, _, key = metric.partition("/")
    if kind not in KINDS or not key:
        raise UserError(
            f"{metric!r} is no metric of a comparison{nearest(kind, KINDS)}; its name begins with "
            f"{', '.join(k + '/' for k in KINDS)}, such as 'train/loss'"
        )
    if kind == "train" and key.endswith("/area"):
        return Name(kind, key.removesuffix("/area"), True)
    return Name(kind, key)


def quantity(key: str) -> str:
    """A KEY for people, with its unit where it is known."""
    whole, _, part = key.partition("/")
    known = {"loss": ("loss", " (nats a token)"), "bits_per_byte": ("bits per byte", "")}
    word, unit = known.get(whole, (whole.replace("_", " "), ""))
    return f"{word}{f' of {part}' if part else ''}{unit}"


def described(metric: str) -> str:
    """What a metric is, for people."""
    name = parse(metric)
    what = quantity(name.key)
    if name.kind == "train":
        return f"train {what}, mean over {'all steps' if name.area else 'the last tenth of the steps'}"
    words = {
        "validation": f"validation {what}",
        "measured": f"{what}, measured after the last step",
        "eta": f"speed-up: FLOPs of the baseline over FLOPs to its final train {what}",
        "spikes": f"train steps with a spike of {what}",
    }
    return words[name.kind]


@dataclasses.dataclass(frozen=True)
class Value:
    """A number that lies between two ends: the same, where it is known."""

    low: float
    high: float

    @classmethod
    def of(cls, number: float) -> "Value":
        return cls(float(number), float(number))

    @property
    def known(self) -> bool:
        return self.low == self.high and math.isfinite(self.low)


DIVERGED = Value(math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run of an arm.

    path: its metrics.jsonl. steps: of the run. flops_per_step: of one update. shift: FLOPs spent before it, by the runs
    that it begins from. diverged: why it ended early, None where it did not.
    """

    arm: str
    seed: int
    path: pathlib.Path
    steps: int
    flops_per_step: float
    shift: float = 0.0
    diverged: str | None = None

    @property
    def flops(self) -> float:
        """Of the whole run and those before it."""
        return self.shift + self.steps * self.flops_per_step

    @functools.cached_property
    def columns(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """split -> key -> (steps, values), in order of steps; NaN where the value was not finite."""
        gathered: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for record in sorted(read(self.path), key=lambda record: record["step"]):
            split = gathered.setdefault(str(record.get("split")), {})
            for key, value in _flat(record):
                split.setdefault(key, []).append((record["step"], math.nan if value is None else float(value)))
        return {
            split: {key: tuple(np.asarray(column, np.float64) for column in zip(*points)) for key, points in by.items()}
            for split, by in gathered.items()
        }

    def column(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values); empty where it was not written."""
        nothing = np.zeros(0)
        return self.columns.get(split, {}).get(key, (nothing, nothing))

    def curve(self, key: str, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(cumulative training FLOPs, running mean of KEY over `window` steps) of the training steps."""
        steps, values = self.column("train", key)
        finite = np.isfinite(values)
        first = steps[0] if len(steps) else 1
        flops = self.shift + (steps - first + 1) * self.flops_per_step
        return flops[finite], running_mean(values[finite], window)

    def has(self, name: Name) -> bool:
        split = "train" if name.kind in ("eta", "spikes") else name.kind
        return len(self.column(split, name.key)[0]) > 0

    def names(self) -> Iterable[str]:
        """Every metric that can be asked of it."""
        for split in ("train", "validation", "measured"):
            for key in self.columns.get(split, {}):
                yield f"{split}/{key}"
        for key in self.columns.get("train", {}):
            yield from (f"train/{key}/area", f"eta/{key}", f"spikes/{key}")


class Metrics:
    """The metrics of all runs of a comparison. baseline: the arm that eta is relative to."""

    def __init__(self, runs: Sequence[Run], *, baseline: str):
        self.runs = {(run.arm, run.seed): run for run in sorted(runs, key=lambda run: run.seed)}
        self.baseline = baseline
        self.arms = tuple(dict.fromkeys(run.arm for run in runs))
        lengths = [run.steps for run in runs if run.arm == baseline] or [run.steps for run in runs]
        self.window = max(1, min(lengths, default=1) // SMOOTHED)

    def of(self, arm: str) -> list[Run]:
        """Its runs, by seed."""
        return [run for (name, _), run in self.runs.items() if name == arm]

    def values(self, metric: str, arm: str) -> dict[int, Value]:
        """The metric of each seed of an arm that has one."""
        name, found = parse(metric), {}
        for run in self.of(arm):
            value = self._value(name, run)
            if value is not None:
                found[run.seed] = value
        return found

    def _value(self, name: Name, run: Run) -> Value | None:
        if name.kind == "eta":
            return self._eta(name.key, run)
        if run.diverged is not None:
            return DIVERGED
        if not run.has(name):
            return None
        if name.kind in ("validation", "measured"):
            return _number(run.column(name.kind, name.key)[1][-1:])
        values = run.column("train", name.key)[1]
        if name.kind == "spikes":
            return Value.of(float(_spikes(values)))
        return _number(values if name.area else values[-max(1, len(values) // 10) :])

    def _eta(self, key: str, run: Run) -> Value | None:
        base = self.runs.get((self.baseline, run.seed))
        if base is None or (run.diverged is None and not run.has(Name("train", key))):
            return None
        flops, curve = base.curve(key, self.window)
        if base.diverged is not None or not len(curve):
            return Value(0.0, math.inf)
        target = curve[-1]
        spent = _reached(flops, curve, target)
        needed = None if run.diverged is not None else _reached(*run.curve(key, self.window), target)
        if needed is None:  # by all it spent it was not there: eta is strictly below this
            return Value(0.0, math.nextafter(spent / run.flops, 0.0))
        return Value.of(spent / needed)

    def refuse_unwritten(self, metric: str, arms: Sequence[str] = (), by: str = "Comparison.metrics") -> None:
        """Raises UserError where a run of these arms that did not diverge lacks the metric; without arms, where every
        run does. by: who names it."""
        name, runs = parse(metric), [run for run in self.runs.values() if run.diverged is None]
        asked = [run for run in runs if run.arm in arms] if arms else runs
        missing = [run for run in asked if not run.has(name)]
        if not missing or (not arms and len(missing) < len(asked)):
            return
        known = sorted({name for run in runs for name in run.names()})
        nobody = all(not run.has(name) for run in runs)
        who = "no arm" if nobody else f"the arm {missing[0].arm} (seed {missing[0].seed}) does not"
        kind = [name for name in known if name.startswith(f"{parse(metric).kind}/") and not name.endswith("/area")]
        hint = nearest(metric, known) or (f"; there are {', '.join(kind[:12])}" if kind else "")
        raise UserError(f"{by} names {metric!r}, which {who} {'writes' if nobody else 'write'}{hint}")


def _flat(record: dict) -> Iterable[tuple[str, float | None]]:
    """The numbers of a record by name: None for one that was not finite."""
    for key, value in record.items():
        if key in ("step", "split"):
            continue
        if isinstance(value, list):
            yield from ((f"{key}/{i:02}", x) for i, x in enumerate(value) if x is None or isinstance(x, int | float))
        elif value is None or isinstance(value, int | float):
            yield key, value


def _number(values: np.ndarray) -> Value:
    finite = values[np.isfinite(values)]
    return DIVERGED if 2 * len(finite) <= len(values) else Value.of(math.fsum(finite) / len(finite))


def _spikes(values: np.ndarray) -> int:
    count, before = 0, []
    for value in values.tolist():
        if not math.isfinite(value):
            count += 1
            continue
        count += bool(before) and value > math.fsum(before) / len(before) + SPIKE
        before = [*before, value][-SPIKE_MEMORY:]
    return count


def _reached(flops: np.ndarray, curve: np.ndarray, target: float) -> float | None:
    """FLOPs after which the curve stays at or below the target, between two steps by a straight line; None where it
    ends above it. That it stays makes the measure fair: a first dip would favour whichever curve is noisier."""
    above = np.flatnonzero(curve > target)
    if not len(curve) or (len(above) and above[-1] == len(curve) - 1):
        return None
    if not len(above):
        return float(flops[0])
    i = above[-1]
    along = (curve[i] - target) / (curve[i] - curve[i + 1])
    return float(flops[i] + along * (flops[i + 1] - flops[i]))
