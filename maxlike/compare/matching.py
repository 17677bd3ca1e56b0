"""Matching: what arms must have in common before their losses may be compared."""

import abc
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import jax
from rich.table import Table

from maxlike.compare.library import Loaded
from maxlike.console import quantity
from maxlike.decode.cache_size import cache_size
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.report.records import read

if TYPE_CHECKING:
    from maxlike.compare.comparison import Comparison
    from maxlike.compare.runs import Finished


@dataclasses.dataclass(frozen=True)
class Matched:
    """The match as a table.

    quantity, unit: what was matched, for people. tolerance: relative to the baseline.
    values: short name -> amount, of every arm, `left_out` ones too. left_out: arms that need not match.
    baseline: the arm that the others are measured against.
    total_flops: short name -> training FLOPs of one run, those of the arms it begins from included.
    """

    quantity: str
    unit: str
    tolerance: float
    values: dict[str, float]
    left_out: tuple[str, ...]
    baseline: str
    total_flops: dict[str, float]

    def relative(self, arm: str) -> float:
        """How far the arm is from the baseline, as a share of the baseline's amount."""
        return self.values[arm] / self.values[self.baseline] - 1

    def table(self) -> Table:
        """For the terminal."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("arm", self.quantity, "to the baseline", "FLOPs of a run"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for arm, value in self.values.items():
            place = "baseline" if arm == self.baseline else f"{100 * self.relative(arm):+.2f} %"
            table.add_row(
                arm,
                quantity(value, self.unit),
                f"{place}, not matched" if arm in self.left_out else place,
                quantity(self.total_flops[arm], "FLOPs"),
            )
        return table

    def refuse(self) -> None:
        """Raises UserError for the first arm that is further from the baseline than the tolerance."""
        for arm in self.values:
            if arm not in self.left_out and abs(self.relative(arm)) > self.tolerance:
                raise UserError(
                    f"the arms {arm} and {self.baseline} do not match: {self.quantity} "
                    f"{quantity(self.values[arm], self.unit)} and {quantity(self.values[self.baseline], self.unit)}, "
                    f"{100 * self.relative(arm):+.1f} %, and {100 * self.tolerance:.3g} % is allowed; change a width, "
                    f"or name {arm} in Comparison.unmatched"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match(abc.ABC):
    """What must be equal. tolerance: largest relative difference from the baseline, >= 0."""

    quantity: ClassVar[str]
    unit: ClassVar[str]
    tolerance: float = 0.02

    def __post_init__(self):
        if self.tolerance < 0:
            raise UserError(f"{type(self).__name__}.tolerance={self.tolerance}: it must not be negative")

    @abc.abstractmethod
    def before(self, comparison: "Comparison", loaded: Mapping[str, Loaded]) -> Matched | None:
        """The match before anything runs; None where it can only be measured. loaded: by short name."""

    @abc.abstractmethod
    def after(self, comparison: "Comparison", loaded: Mapping[str, Loaded], finished: "Sequence[Finished]") -> Matched:
        """The match with what the runs measured."""

    def _matched(self, comparison: "Comparison", loaded: Mapping[str, Loaded], values: dict[str, float]) -> Matched:
        total = {
            arm: loaded[arm].flops + sum(loaded[name].flops for name in comparison.ancestors(arm) if name in loaded)
            for arm in values
        }
        left_out = tuple(arm for arm in values if arm in comparison.unmatched)
        return Matched(self.quantity, self.unit, self.tolerance, values, left_out, comparison.baseline, total)


class Counted(Match):
    """A match that is known from the experiments alone."""

    @abc.abstractmethod
    def of(self, experiment: Experiment) -> float:
        """The amount, of an experiment."""

    def before(self, comparison: "Comparison", loaded: Mapping[str, Loaded]) -> Matched:
        return self._matched(comparison, loaded, {arm: self.of(one.experiment) for arm, one in loaded.items()})

    def after(self, comparison: "Comparison", loaded: Mapping[str, Loaded], finished: "Sequence[Finished]") -> Matched:
        del finished
        return self.before(comparison, loaded)


class ActiveFlops(Counted):
    """Training FLOPs of a token, attention at the experiment's length included (`flops_per_token`)."""

    quantity, unit = "training FLOPs a token", "FLOPs"

    def of(self, experiment: Experiment) -> float:
        return experiment.bare().flops_per_token(experiment.sequence_length)


class Parameters(Counted):
    """Parameters of the network, idle experts included."""

    quantity, unit = "parameters", ""

    def of(self, experiment: Experiment) -> float:
        return float(sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params)))


class CacheBytes(Counted):
    """Bytes of the decoding cache of one row of `Experiment.sequence_length` tokens, in the compute dtype. Refuses a
    network that has no cache."""

    quantity, unit = "decoding cache of a row", "B"

    def of(self, experiment: Experiment) -> float:
        size = cache_size(experiment)
        if size.refusal is not None:
            raise UserError(f"matching.CacheBytes: {size.refusal}; match something else, such as matching.ActiveFlops")
        return size.a_token * experiment.sequence_length + size.state


class StepTime(Match):
    """Seconds of a training step as measured, the median over the steps of all seeds: known after the runs only, which
    must have had the machine for themselves. A run that diverged counts with the steps it made."""

    quantity, unit = "measured step time", "s"

    def before(self, comparison: "Comparison", loaded: Mapping[str, Loaded]) -> None:
        return None

    def after(self, comparison: "Comparison", loaded: Mapping[str, Loaded], finished: "Sequence[Finished]") -> Matched:
        seconds: dict[str, list[float]] = {}
        for one in finished:
            seconds.setdefault(one.planned.name, []).extend(_step_seconds(one))
        values = {arm: statistics.median(times) for arm, times in seconds.items() if times}
        return self._matched(comparison, loaded, {arm: values[arm] for arm in loaded if arm in values})


def _step_seconds(one: "Finished") -> list[float]:
    tokens = one.experiment.clock.tokens_per_step
    rates = [row.get("tokens_per_second") for row in read(one.directory / "metrics.jsonl") if row["split"] == "train"]
    return [tokens / rate for rate in rates if rate]
