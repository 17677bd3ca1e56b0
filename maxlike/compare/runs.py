"""Runs: many experiments trained one after the other, each once, resumable, in one directory.

A run lies in `<directory>/<name>/seed_<seed>`, an ordinary run directory with planned.json, finished.json and log.txt
(the words of its training) beside.
"""

import contextlib
import dataclasses
import io
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax

from maxlike import interrupt
from maxlike.compare import records
from maxlike.compare.library import Library, Loaded
from maxlike.compare.progress import Progress
from maxlike.compare.records import Fingerprint
from maxlike.console import duration
from maxlike.errors import Diverged, UserError
from maxlike.experiment import Experiment
from maxlike.program import Program
from maxlike.run_dir import RunDirectory
from maxlike.sharding import Layout
from maxlike.train import fit


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run to be made.

    name: of its directory, `<directory>/<name>/seed_<seed>`. experiment, overlays, bindings: what config.load takes.
    seed: number of the run, >= 0, added to `Experiment.seed`. after: name of the planned run of the same number whose
    parameters it begins with, or None; its experiment has a warm start.
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


@runtime_checkable
class Pointable(Protocol):
    """A warm start that can begin from another run; its knob is called `source`."""

    source: pathlib.Path

    def from_run(self, source: pathlib.Path | str) -> "Pointable":
        """The same from that run."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """A planned run with everything that making it takes."""

    planned: Planned
    directory: pathlib.Path
    experiment: Experiment
    loaded: Loaded
    ancestor: "_Run | None"
    fingerprint: Fingerprint

    @property
    def root(self) -> "_Run":
        """The first run of the chain that it belongs to."""
        return self if self.ancestor is None else self.ancestor.root

    @property
    def title(self) -> str:
        return f"{self.planned.name} seed {self.planned.seed}"

    def finished(self) -> Finished | None:
        record = records.ended(self.directory, self.fingerprint)
        return record and Finished(self.planned, self.directory, self.experiment, record["diverged"])


def execute(
    planned: Sequence[Planned],
    directory: pathlib.Path,
    *,
    shard: tuple[int, int] = (1, 1),
    library: Library | None = None,
    then: Callable[[Finished], None] = lambda made: None,
) -> list[Finished]:
    """Makes the planned runs that are not made yet, ancestors first, and returns those that are finished, in order.

    A run that diverges is a result and not the end. A run of the same configuration that is there already is taken as
    it is. All processes of a multi-host job call it alike.

    shard: (i, n) makes only the i-th of n shares, i from 1; a run and those that begin from it are in one share.
    library: of experiments that were loaded already. then: called with each run that is made here, when it is recorded.
    A request to stop (SIGTERM, Ctrl-C) ends it after a checkpoint, with fewer runs than planned; the same call goes on.
    Raises UserError where two runs have one name and number, an ancestor is not planned, a directory holds another
    configuration's run, or another process is at work on the same share.
    """
    runs = _prepare(planned, pathlib.Path(directory), library or Library())
    share = _share(runs, shard)
    out = None if jax.process_index() == 0 else io.StringIO()  # one process speaks for all
    with _claim(pathlib.Path(directory), shard), interrupt.listening():
        for run in share:
            records.begin(run.directory, run.fingerprint, run.planned.experiment)
        left = [run for run in share if run.finished() is None]
        flops, done = sum(run.loaded.flops for run in left), len(share) - len(left)
        with Progress(flops=flops, runs=len(share), done=done, file=out) as shown:
            programs = _Programs()
            for run in left:
                _make(run, shown, programs)
                made = run.finished()
                if made is not None:
                    then(made)
                if interrupt.requested():
                    shown.say(f"stopped as asked in {run.title}; the same command continues")
                    break
    return [made for made in (run.finished() for run in runs) if made is not None]


def _make(run: _Run, shown: Progress, programs: "_Programs") -> None:
    """Trains a run to its end, or to a request to stop, and records how it ended."""
    began, diverged, validation = time.monotonic(), None, {}
    screen = shown.begin(run.title, run.loaded.flops, run.experiment.steps, run.directory / "log.txt")
    ancestor = run.ancestor and run.ancestor.finished()
    if ancestor is not None and ancestor.diverged is not None:
        screen.close()
        diverged = f"it begins from {run.ancestor.title}, which diverged"
    else:
        try:
            validation = fit(run.experiment, run.directory, screen, programs)
        except Diverged as reason:
            diverged = str(reason)
    if interrupt.requested():
        return
    seconds = time.monotonic() - began
    if jax.process_index() == 0:
        records.finish(run.directory, run.fingerprint, diverged, seconds)
    loss = f"validation loss {validation['loss']:.4f}, " if "loss" in validation else ""
    shown.end(f"{run.title}: {f'diverged: {diverged}, ' if diverged else loss}{duration(seconds)}")


class _Programs:
    """Keeps the compiled functions of one experiment: the next seed needs the same."""

    def __init__(self):
        self._last: Program | None = None

    def __call__(self, experiment: Experiment, layout: Layout) -> Program:
        if self._last is not None and self._last.serves(experiment):
            self._last = self._last.rerun(experiment)
        else:
            self._last = Program.of(experiment, layout)
        return self._last


def _prepare(planned: Sequence[Planned], directory: pathlib.Path, library: Library) -> list[_Run]:
    """The runs in an order in which they can be made: those of one name together, each behind those it begins from."""
    by_key = {(one.name, one.seed): one for one in planned}
    if len(by_key) < len(planned):
        raise UserError("two planned runs have the same name and seed: give each point of a sweep a name of its own")
    made: dict[tuple[str, int], _Run] = {}

    def make(one: Planned, waiting: tuple[str, ...] = ()) -> _Run:
        key = (one.name, one.seed)
        if key in made:
            return made[key]
        if one.name in waiting:
            raise UserError(f"{one.name} begins from itself, by way of {', '.join(waiting)}: break the circle")
        before = one.after and by_key.get((one.after, one.seed))
        if one.after and before is None:
            raise UserError(f"{one.name} begins from {one.after} seed {one.seed}, which is not planned: plan it too")
        ancestor = before and make(before, (*waiting, one.name))
        made[key] = _run(one, directory, library, ancestor)
        return made[key]

    for one in planned:
        make(one)
    return sorted(made.values(), key=_depth)  # stable: seeds of one name stay together


def _depth(run: _Run) -> int:
    return 0 if run.ancestor is None else 1 + _depth(run.ancestor)


def _run(one: Planned, directory: pathlib.Path, library: Library, ancestor: _Run | None) -> _Run:
    loaded = library.load(one.experiment, one.overlays, one.bindings)
    experiment, warm_start = loaded.experiment, loaded.experiment.warm_start
    if ancestor is not None:
        if not isinstance(warm_start, Pointable):
            raise UserError(
                f"{one.experiment} begins from {ancestor.planned.name} and has no warm start that takes another "
                "source: bind Experiment.warm_start in it, such as @warm_start.WarmStart()"
            )
        warm_start = warm_start.from_run(ancestor.directory)
    experiment = experiment.rerun(seed=experiment.seed + one.seed, warm_start=warm_start)
    fingerprint = Fingerprint.of(experiment, loaded.identity, ancestor and ancestor.fingerprint)
    where = directory / one.name / f"seed_{one.seed}"
    return _Run(one, where, experiment, loaded, ancestor, fingerprint)


def _share(runs: Sequence[_Run], shard: tuple[int, int]) -> list[_Run]:
    """The runs of one share. Chains of runs that begin from each other stay together; the dearest go first, each to
    the share that has least, so that every process finds the same shares."""
    index, count = shard
    chains: dict[_Run, list[_Run]] = {}
    for run in runs:
        chains.setdefault(run.root, []).append(run)
    loads = [0.0] * count
    of_share: list[set[_Run]] = [set() for _ in range(count)]
    for chain in sorted(chains.values(), key=lambda chain: -sum(run.loaded.flops for run in chain)):
        least = loads.index(min(loads))
        loads[least] += sum(run.loaded.flops for run in chain)
        of_share[least] |= set(chain)
    return [run for run in runs if run in of_share[index - 1]]


@contextlib.contextmanager
def _claim(directory: pathlib.Path, shard: tuple[int, int]) -> Iterator[None]:
    """Holds the directory for this process: the whole of it, or one share beside the processes that make the others. A
    run that two processes want nevertheless, in shares of different numbers, is held by its own lock."""
    alone = shard == (1, 1)
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            held.enter_context(RunDirectory(directory, mode="own" if alone else "share"))
            if not alone:
                held.enter_context(RunDirectory(directory / "shards" / f"{shard[0]}_of_{shard[1]}"))
        yield
