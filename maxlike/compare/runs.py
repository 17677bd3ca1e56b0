"""Runs: many experiments trained one after the other, each once, resumable, in one directory."""

import dataclasses
import pathlib
from collections.abc import Sequence

from maxlike.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run to be made.

    name: of its directory, `<directory>/<name>/seed_<seed>`. experiment, overlays, bindings: what config.load takes.
    seed: number of the run, >= 0, added to `Experiment.seed`. after: name of the planned run of the same seed whose
    parameters it begins with, or None.
    """

    name: str
    experiment: str
    overlays: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    seed: int = 0
    after: str | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that was made. directory: an ordinary run directory. experiment: what was trained, with its seed.
    diverged: why it could not be trained to its end, or None; its metrics are infinite."""

    planned: Planned
    directory: pathlib.Path
    experiment: Experiment
    diverged: str | None = None


def execute(planned: Sequence[Planned], directory: pathlib.Path, *, shard: tuple[int, int] = (1, 1)) -> list[Finished]:
    """Makes the planned runs that are not made yet, ancestors first, and returns those that are finished.

    shard: (i, n) makes only the i-th of n shares, i from 1. A request to stop ends it early, with fewer than planned.
    """
    del planned, directory, shard
    return []
