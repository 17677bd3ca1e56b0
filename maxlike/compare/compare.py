"""`--job compare`: every arm of a comparison for each seed, and the verdict."""

import functools
import pathlib

import jax
from rich.console import Console as Rich

from maxlike.compare import library, pairing, runs, tables, verdict, written
from maxlike.compare.comparison import Comparison
from maxlike.compare.library import Library, Loaded
from maxlike.compare.runs import Planned
from maxlike.errors import UserError


def compare(
    comparison: Comparison,
    run_dir: pathlib.Path,
    *,
    seeds: int | None = None,
    shard: str = "1/1",
    arms: tuple[str, ...] = (),
) -> verdict.Verdict | None:
    """Runs every arm for each seed, each once and resumable, and judges the claim by its rule: verdict.json,
    report.html. Run again, it goes on where it was and makes only what is not there; the rule must still be the one
    from before the runs.

    seeds: another number of them than the comparison asks for. shard: i/n makes this process's share only, in a
    directory that the others share; the last one judges. arms: only these and what they begin from, without a verdict;
    repeatable.
    """
    seeds = comparison.seeds if seeds is None else seeds
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1, and 3 for an interval")
    share = library.parse_shard(shard)
    library.refuse_strangers("--arms", arms, tuple(comparison.experiments))
    known = Library()
    loaded = load(comparison, known)
    pairing.check(comparison, loaded)
    chief = jax.process_index() == 0
    out = Rich(highlight=False, quiet=not chief)
    matched = comparison.match.before(comparison, loaded)
    if matched is not None:
        out.print(matched.table())
        matched.refuse()
    planned = plan(comparison, seeds, arms)
    where = pathlib.Path(run_dir) / "arms"
    written.keep(comparison, run_dir, where)
    refuse = functools.partial(verdict.refuse_unwritten_by, comparison)
    finished = runs.execute(planned, where, shard=share, library=known, then=refuse)
    if len(finished) < len(planned):
        out.print(f"{len(finished)} of {len(planned)} runs are there: the verdict comes with the last", soft_wrap=True)
        return None
    if arms or not chief:
        return None
    measured = comparison.match.after(comparison, loaded, finished)
    if matched is None:
        out.print(measured.table())
        measured.refuse()
    concluded = verdict.conclude(comparison, finished, pathlib.Path(run_dir), measured)
    tables.show(concluded.content, out)
    out.print(f"report: {pathlib.Path(run_dir) / 'report.html'}", soft_wrap=True)
    return concluded


def load(comparison: Comparison, known: Library) -> dict[str, Loaded]:
    """Short name -> the arm's experiment, with the overlays and bindings that the comparison was loaded with. Raises
    UserError for one that no arm has a use for."""
    loaded = {
        arm: known.load(name, comparison.overlays, comparison.bindings) for arm, name in comparison.experiments.items()
    }
    known.refuse_useless()
    return loaded


def plan(comparison: Comparison, seeds: int, arms: tuple[str, ...] = ()) -> list[Planned]:
    """The runs: arm by arm, so that what is compiled serves all seeds. arms: short names, none for all."""
    wanted = {name for arm in arms or comparison.experiments for name in (arm, *comparison.ancestors(arm))}
    return [
        Planned(
            arm, comparison.experiments[arm], comparison.overlays, comparison.bindings, seed, comparison.after.get(arm)
        )
        for arm in comparison.ordered()
        if arm in wanted
        for seed in range(seeds)
    ]
