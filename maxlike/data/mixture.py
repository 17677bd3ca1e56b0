"""Mixtures: which source each example of a run comes from, as a pure function of its number.

From "Does your data spark joy? Performance gains from domain upsampling at the end of training" (arXiv 2406.03476),
whose window of upsampled sources at the end of training is `two_phase`. The interleave is the proportional one of
Grain: no random draw, so the share of a source is never off by more than the number of sources less one, and nothing
but the example's number is needed to resume.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from maxlike.data import files
from maxlike.errors import UserError

Weights = dict[str, float]
_LARGEST_SUM = 1_000_000  # of integer weights: keeps every product of the interleave inside 64 bits


class Mixture:
    """Weights of the sources, constant or changing with the step.

    phases: ((start step, {source: weight}), ...), the first at 0, steps rising. Weights are shares of examples, which
        with packed rows are shares of tokens; they need not sum to 1. Integers are taken as they are; others are
        rounded to integers that sum to `resolution`, by largest remainder. A source that is absent weighs 0.
    max_epochs: how often a source may be read through in the whole run: a number for all, {source: number}, or None.
    on_exceed: 'refuse' or 'warn' when the run would read a source more often.
    Refuses negative or non-finite weights, all of them zero, a weight that rounds to zero, phases out of order or not
    on whole steps, and integer weights that sum to more than a million.
    """

    def __init__(
        self,
        *,
        phases: tuple,
        max_epochs: dict | float | None = None,
        on_exceed: Literal["refuse", "warn"] = "refuse",
        resolution: int = 10_000,
    ):
        if on_exceed not in ("refuse", "warn"):
            raise UserError(f"Mixture.on_exceed={on_exceed!r} must be 'refuse' or 'warn'")
        if not 1 <= resolution <= _LARGEST_SUM:
            raise UserError(f"Mixture.resolution={resolution} must lie in 1 .. {_LARGEST_SUM}")
        self.starts = _starts([phase[0] for phase in phases])
        self.weights = [whole_weights(phase[1], resolution) for phase in phases]
        self.max_epochs, self.on_exceed = max_epochs, on_exceed

    def names(self) -> list[str]:
        """Every source that any phase names."""
        return list(dict.fromkeys(name for weights in self.weights for name in weights))

    def interleave(self, sources: Sequence[str], batch_size: int) -> "Interleave":
        """The mixture over the sources in the order in which Data has them. Refuses a name Data does not have."""
        for name in self.names():
            if name not in sources:
                raise UserError(
                    f"Mixture.phases names {name!r}, but the sources are {', '.join(sources)}; mend the name"
                )
        weights = tuple(tuple(weights.get(name, 0) for name in sources) for weights in self.weights)
        return Interleave(tuple(sources), tuple(start * batch_size for start in self.starts), weights)

    def check_epochs(self, epochs: dict[str, float]) -> None:
        """Refuse, or warn of, a run that reads a source more often than max_epochs; the message tables all sources."""
        caps = self.max_epochs if isinstance(self.max_epochs, dict) else dict.fromkeys(epochs, self.max_epochs)
        for name in caps:
            if name not in epochs:
                raise UserError(f"Mixture.max_epochs names {name!r}, but the sources are {', '.join(epochs)}")
        over = [name for name, cap in caps.items() if cap is not None and epochs[name] > cap]
        if not over:
            return
        table = "\n".join(f"  {name}: {value:.2f} epochs, at most {caps.get(name)}" for name, value in epochs.items())
        message = (
            f"The run would read {', '.join(over)} more often than Mixture.max_epochs allows; lower the weight, train "
            f"fewer steps or raise the cap:\n{table}"
        )
        if self.on_exceed == "refuse":
            raise UserError(message)
        warnings.warn(message, stacklevel=2)


def _starts(starts: list) -> list[int]:
    if not starts:
        raise UserError("Mixture.phases is empty; give at least ((0, {source: weight}),)")
    if any(isinstance(start, bool) or start != int(start) for start in starts):
        raise UserError(f"Mixture.phases starts at {starts}: each must be a whole step, or a batch would be split")
    if starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise UserError(f"Mixture.phases starts at {starts}: the first must be 0 and the others rise")
    return [int(start) for start in starts]


def whole_weights(weights: Weights, resolution: int) -> dict[str, int]:
    """Integer weights: as given when all are integers, else rounded by largest remainder to sum to `resolution`."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not math.isfinite(weight) or weight < 0:
            raise UserError(f"Mixture.phases: the weight {weight} of {name!r} must be a number that is not negative")
    total = sum(weights.values())
    if not total:
        raise UserError(f"Mixture.phases: all weights of {weights} are zero; give at least one source a share")
    if all(isinstance(weight, int) for weight in weights.values()):
        if total > _LARGEST_SUM:
            raise UserError(
                f"Mixture.phases: integer weights sum to {total}, more than {_LARGEST_SUM}; scale them down"
            )
        return dict(weights)
    exact = {name: weight * resolution / total for name, weight in weights.items()}
    rounded = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: rounded[name] - exact[name])  # stable: ties by order of naming
    for name in by_remainder[: resolution - sum(rounded.values())]:
        rounded[name] += 1
    for name, weight in weights.items():
        if weight and not rounded[name]:
            raise UserError(
                f"Mixture.phases: the weight {weight} of {name!r} rounds to none of {resolution}; raise it or "
                "Mixture.resolution"
            )
    return rounded


class Interleave:
    """The pure map from an example's number to (source, key); keys of each source run 0, 1, 2, ... across phases.

    names: the sources. starts: the example at which each phase starts. weights: integers [phases][sources].
    """

    def __init__(self, names: tuple[str, ...], starts: tuple[int, ...], weights: tuple[tuple[int, ...], ...]):
        self.names, self.starts, self.weights = names, starts, weights
        offsets = [np.zeros(len(names), np.int64)]
        for start, end, phase in zip(starts, starts[1:], weights):
            offsets.append(offsets[-1] + _counts(end - start, phase))
        self._offsets = offsets  # what each source has given before each phase

    def phase(self, example: int) -> int:
        """The phase that an example belongs to."""
        return int(np.searchsorted(self.starts, example, side="right")) - 1

    def counts(self, examples: int) -> np.ndarray:
        """How many of the first `examples` come from each source, in closed form: int64 [sources]."""
        phase = self.phase(examples)
        return self._offsets[phase] + _counts(examples - self.starts[phase], self.weights[phase])

    def expected(self, examples: int) -> np.ndarray:
        """The same as the weights ask for, without rounding: float64 [sources]."""
        asked = np.zeros(len(self.names))
        for start, end, phase in zip(self.starts, [*self.starts[1:], examples], self.weights):
            asked += max(0, min(end, examples) - start) * np.array(phase) / sum(phase)
        return asked

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, key) of each example: int64 [n] twice."""
        sources, keys = np.zeros(len(examples), np.int64), np.zeros(len(examples), np.int64)
        phases = np.searchsorted(self.starts, examples, side="right") - 1
        for phase in np.unique(phases):
            here = phases == phase
            source, key = _locate(examples[here] - self.starts[phase], self.weights[phase])
            sources[here], keys[here] = source, key + self._offsets[phase][source]
        return sources, keys

    def history(self, examples: int) -> str:
        """Identifies the map over the first `examples`: phases that start later, and weights of zero, do not matter."""
        phases = [
            [start, {name: weight for name, weight in zip(self.names, phase) if weight}]
            for start, phase in zip(self.starts, self.weights)
            if start < examples or start == 0
        ]
        order = [list(weights) for _, weights in phases]  # the order of visiting matters, which sorted keys would hide
        return files.digest("mixture", phases, order)


def _counts(examples: int, weights: Sequence[int]) -> np.ndarray:
    counts, remaining = [], sum(weights)
    for weight in weights:
        left = examples * (remaining - weight) // remaining if weight else examples
        counts.append(examples - left)
        examples, remaining = left, remaining - weight
    return np.array(counts, np.int64)


def _locate(examples: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sources are visited in order; an example is the source's own when the number of examples left to the sources
    behind it does not grow with it."""
    sources, keys = np.full(len(examples), -1, np.int64), np.zeros(len(examples), np.int64)
    now, remaining = examples.astype(np.int64), sum(weights)
    for source, weight in enumerate(weights):
        if weight == 0:
            continue
        left = now * (remaining - weight) // remaining
        own = (sources < 0) & ((now + 1) * (remaining - weight) // remaining == left)
        sources[own], keys[own] = source, (now - left)[own]
        now, remaining = left, remaining - weight
    return sources, keys


def two_phase(*, base: Weights, final: Weights, total_steps: int, fraction: float = 0.2) -> tuple:
    """Phases of domain upsampling: `base`, then `final` for the last `fraction` of `total_steps` (the paper's best
    window is 0.1 to 0.2). Refuses a window that is not a whole number of steps."""
    if not 0 < fraction <= 1:
        raise UserError(f"two_phase.fraction={fraction} must lie in (0, 1]")
    window = fraction * total_steps
    if abs(window - round(window)) > 1e-6 or round(window) < 1:
        raise UserError(
            f"two_phase: {fraction} of {total_steps} steps is {window:g}, not a whole number; change either"
        )
    start = total_steps - round(window)
    return ((0, base), (start, final)) if start else ((0, final),)


def linear(*, start: int, end: int, weights_a: Weights, weights_b: Weights, pieces: int = 20) -> tuple:
    """Phases that go from `weights_a` (until step `start`) to `weights_b` (from step `end`) in equal steps, `pieces`
    of them. Refuses an interval of fewer steps than pieces."""
    if pieces < 1 or end - start < pieces or start < 0:
        raise UserError(f"linear: start={start}, end={end} cannot hold pieces={pieces}; it takes a step a piece")
    names = list(dict.fromkeys([*weights_a, *weights_b]))
    a, b = (
        {name: weights.get(name, 0) / sum(weights.values()) for name in names} for weights in (weights_a, weights_b)
    )
    ramp = [
        (
            start + (end - start) * piece // pieces,
            {name: (a[name] * (pieces - piece) + b[name] * piece) / pieces for name in names},
        )
        for piece in range(1, pieces + 1)
    ]
    return ((0, weights_a), *ramp)


def leave_one_out(*, weights: Weights, source: str, among: tuple[str, ...] = ()) -> Weights:
    """The weights without one source, its share given to the others in proportion: to those of `among` alone (its
    class, whose share then stays), or to all when that is empty. For measuring what a source is worth."""
    others = [name for name in among or weights if name != source and weights.get(name, 0) > 0]
    if source not in weights or not others:
        raise UserError(f"leave_one_out: {source!r} must be one of {list(weights)} and others must take its share")
    total = sum(weights[name] for name in others)
    return {
        name: 0 if name == source else weight * (1 + weights[source] / total) if name in others else weight
        for name, weight in weights.items()
    }
