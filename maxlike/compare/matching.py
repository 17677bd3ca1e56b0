"""Matching: what arms must have in common before their losses may be compared."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import jax

from maxlike.decode.cache_size import cache_size
from maxlike.errors import UserError
from maxlike.experiment import Experiment

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What must be equal. tolerance: largest relative difference from the baseline, >= 0."""

    quantity: ClassVar[str]
    unit: ClassVar[str]
    tolerance: float = 0.02

    def __post_init__(self):
        if self.tolerance < 0:
            raise UserError(f"{type(self).__name__}.tolerance={self.tolerance}: it must not be negative")


class ActiveFlops(Match):
    """Training FLOPs of a token, attention at the experiment's length included (`flops_per_token`)."""

    quantity, unit = "training FLOPs a token", "FLOPs"

    def of(self, experiment: Experiment) -> float:
        return experiment.bare().flops_per_token(experiment.sequence_length)


class Parameters(Match):
    """Parameters of the network, idle experts included."""

    quantity, unit = "parameters", ""

    def of(self, experiment: Experiment) -> float:
        return float(sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params)))


class CacheBytes(Match):
    """Bytes of the decoding cache of one row of `Experiment.sequence_length` tokens, in the compute dtype. Refuses a
    network that has no cache."""

    quantity, unit = "decoding cache of a row", "B"

    def of(self, experiment: Experiment) -> float:
        size = cache_size(experiment)
        if size.refusal is not None:
            raise UserError(f"matching.CacheBytes: {size.refusal}; match something else, such as matching.ActiveFlops")
        return size.a_token * experiment.sequence_length + size.state


class StepTime(Match):
    """Seconds of a training step as measured, the median over the steps of all seeds: known after the runs only."""

    quantity, unit = "measured step time", "s"
