"""Sweep: one experiment at many settings of its knobs."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from typing import Any, ClassVar

from maxlike.compare import metrics
from maxlike.compare.runs import Planned
from maxlike.errors import UserError
from maxlike.noun import Noun
from maxlike.scaling.points import Point, binding, short_names

LONGEST = 80  # characters of a directory's name


@dataclasses.dataclass(kw_only=True)
class Sweep(Noun):
    """An experiment trained at every point, each with every seed.

    experiment: its name, or a path to a gin file; overlays, and bindings as `--set` takes them: put on top of it.
    points: Product or Zip of lists of values of its knobs. seeds: runs a point, >= 1, the same seeds at every point.
    metric: what is shown and minimised, named as comparisons name metrics: 'validation/loss', 'train/loss'; all are
    recorded. config: of the gin file.
    Raises UserError for a number of seeds below 1 and a metric of no known kind.
    """

    binds: ClassVar[str] = "sweep.Sweep"
    contains_experiments: ClassVar[bool] = True

    experiment: str
    points: Callable
    seeds: int = 1
    metric: str = "validation/loss"
    overlays: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    config: Any = None

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f"Sweep.seeds={self.seeds}: give at least 1")
        metrics.parse(self.metric)

    def configured(self, configuration: Any) -> "Sweep":
        for text in configuration.bindings:
            knob = text.partition("=")[0].strip()
            if knob in self.points.points[0]:
                raise UserError(f"--set {text}: the sweep has values of {knob} of its own; leave one of the two out")
        return dataclasses.replace(self, config=configuration)

    def described(self) -> str:
        return f"a sweep over {self.experiment}"

    @property
    def short(self) -> dict[str, str]:
        """Knob -> the name that a table has room for."""
        return short_names(list(self.points.points[0]))

    def planned(self, seeds: int | None = None) -> list[tuple[Point, Planned]]:
        """Every run with its point, seeds of a point together. seeds: another number of them."""
        overlays, bindings = self.overlays, self.bindings
        if self.config is not None:
            overlays, bindings = (*overlays, *self.config.overlays), (*bindings, *self.config.bindings)
        return [
            (
                point,
                Planned(
                    name=f"points/{self.directory(point)}",
                    experiment=self.experiment,
                    overlays=overlays,
                    bindings=(*bindings, *(binding(knob, value) for knob, value in point.items())),
                    seed=seed,
                ),
            )
            for point in self.points.points
            for seed in range(self.seeds if seeds is None else seeds)
        ]

    def directory(self, point: Point) -> str:
        """The name of a point's directory, which depends on the point alone: a longer sweep finds the runs of a shorter
        one again."""
        words = ",".join(f"{name}={point[knob]}" for knob, name in self.short.items())
        name = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", words)
        if name == words and len(name) <= LONGEST:
            return name
        digest = hashlib.sha256(repr(sorted(point.items())).encode()).hexdigest()[:8]
        return f"{name[:LONGEST]}-{digest}"
