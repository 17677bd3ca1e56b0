"""Comparison: a paper's claim as experiments, and the rule that says whether it held."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from maxlike.catalog import nearest
from maxlike.compare import rules
from maxlike.compare.matching import ActiveFlops
from maxlike.compare.metrics import parse
from maxlike.errors import UserError
from maxlike.noun import Noun


@dataclasses.dataclass(kw_only=True)
class Comparison(Noun):
    """Arms that are compared over seeds, and the rule that judges them; `--job compare` runs it.

    title, source: of the paper ("MoMa: ...", "arXiv 2407.21770"). claim: what the paper says, in one sentence.
    falsified_by: what would show that it is wrong, in one sentence.
    arms: names of experiments. The last part of a name is the arm's short name, by which everything else names it.
    baseline: the arm that the others are compared with, by its short name.
    seeds: runs of each arm, >= 1. Run s of an arm has the seed `Experiment.seed + s`, so matched arms share their seeds
        and an arm that goes on from another one may have other data.
    match: what the arms have in common, such as matching.ActiveFlops(); refused beyond its tolerance.
    unmatched: arms that the match leaves out, such as stages that follow others.
    after: {arm: arm that it begins from}; its experiment has a warm start, which is pointed at the finished run of the
        same number. Such an arm may train for other steps than the rest, but is then `unmatched`.
    rule: criteria of maxlike.compare.rules; the comparison holds if all of them do.
    metrics: names of metrics that the table and the plots show beside those of the rule.
    scales: {name such as 'h200': overlay such as 'papers/moma/h200'}, for the report's words on the paper's scale.
    config: the `maxlike.config.Configuration` it was loaded from; None where it was built in Python.

    Raises UserError for seeds below 1, fewer than two arms, two arms of one name, a name that is no arm's, a metric of
    no known kind, and arms that begin from each other in a circle.
    """

    binds: ClassVar[str] = "comparison.Comparison"
    contains_experiments: ClassVar[bool] = True

    title: str
    source: str
    claim: str
    falsified_by: str
    arms: tuple[str, ...]
    baseline: str
    seeds: int = 3
    match: Callable = dataclasses.field(default_factory=ActiveFlops)
    unmatched: tuple[str, ...] = ()
    after: dict[str, str] = dataclasses.field(default_factory=dict)
    rule: tuple = ()
    metrics: tuple[str, ...] = ()
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    config: Any = None

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f"Comparison.seeds={self.seeds}: give at least 1, and 3 for an interval")
        if len(self.arms) < 2:
            raise UserError(f"Comparison.arms={self.arms}: a comparison needs at least two experiments")
        if len(self.experiments) < len(self.arms):
            raise UserError(f"Comparison.arms={self.arms}: two arms have one short name, the last part; rename one")
        named = {"baseline": (self.baseline,), "unmatched": self.unmatched}
        named["after"] = (*self.after, *self.after.values())
        for knob, names in named.items():
            for name in names:
                self._refuse_stranger(knob, name)
        rules.check_arms(self.rule, tuple(self.experiments))
        for metric in self.metrics:
            parse(metric)
        for arm in self.after:
            if arm in self.ancestors(arm):
                raise UserError(f"Comparison.after={self.after}: {arm} begins from itself; break the circle")

    @property
    def experiments(self) -> dict[str, str]:
        """Short name -> experiment, in the order of `arms`."""
        return {name.removesuffix(".gin").rpartition("/")[2]: name for name in self.arms}

    @property
    def matched(self) -> tuple[str, ...]:
        """Short names of the arms that must match, in the order of `arms`."""
        return tuple(arm for arm in self.experiments if arm not in self.unmatched)

    @property
    def overlays(self) -> tuple[str, ...]:
        """Of every arm, from the command line."""
        return () if self.config is None else self.config.overlays

    @property
    def bindings(self) -> tuple[str, ...]:
        """Of every arm that has a use for them, from the command line."""
        return () if self.config is None else self.config.bindings

    @property
    def own_bindings(self) -> tuple[str, ...]:
        """Of the comparison itself, from the command line."""
        return () if self.config is None else self.config.own

    def ancestors(self, arm: str) -> tuple[str, ...]:
        """The arms that `arm` begins from, the nearest first; a circle is followed once."""
        found: list[str] = []
        while arm in self.after and self.after[arm] not in found:
            arm = self.after[arm]
            found.append(arm)
        return tuple(found)

    def ordered(self) -> Iterator[str]:
        """Short names, each after those it begins from."""
        return iter(sorted(self.experiments, key=lambda arm: len(self.ancestors(arm))))

    def configured(self, configuration: Any) -> "Comparison":
        return dataclasses.replace(self, config=configuration)

    def described(self) -> str:
        return f"a comparison: name one of its arms, {', '.join(self.arms)}"

    def _refuse_stranger(self, knob: str, name: str) -> None:
        if name not in self.experiments:
            raise UserError(
                f"Comparison.{knob} names {name!r}, which is no arm{nearest(name, self.experiments)}; "
                f"the arms are {', '.join(self.experiments)}"
            )
