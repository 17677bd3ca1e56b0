"""`--job sweep`: runs a sweep, and records what every run came to in sweep.json."""

import json
import math
import pathlib
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from maxlike.compare import metrics
from maxlike.compare.library import Library, parse_shard
from maxlike.compare.runs import Finished, Planned, execute
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.manifest import write_text
from maxlike.scaling import sweep_plot
from maxlike.scaling.points import Point
from maxlike.scaling.sweep import Sweep
from maxlike.sharding import flat_axes, path_names

FILE = "sweep.json"


def sweep(sweep: Sweep, run_dir: pathlib.Path, *, seeds: int | None = None, shard: str = "1/1") -> None:
    """Trains the experiment at every point of the sweep, each run once and resumable, and writes sweep.json (a record
    a run: its point, seed, facts and all metrics), sweep.png and a table.

    seeds: another number of them than the sweep asks for. shard: i/n runs this process's share only, in a directory
    that the others share.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1")
    planned, library = sweep.planned(seeds), Library()
    check(planned, library)
    point_of = {(one.name, one.seed): point for point, one in planned}

    def recorded(made: list[Finished]) -> list[dict[str, Any]]:
        records = [record(one, point_of[one.planned.name, one.planned.seed], run_dir) for one in made]
        _refuse_unwritten(sweep, records)
        return records

    finished = execute(
        [one for _, one in planned],
        run_dir,
        shard=parse_shard(shard),
        library=library,
        then=lambda made: recorded([made]),  # a metric that nobody writes is refused after the first run, not the last
    )
    if jax.process_index() or not finished:
        return
    records = recorded(finished)
    content = {"experiment": sweep.experiment, "metric": sweep.metric, "short": sweep.short, "planned": len(planned)}
    write_text(pathlib.Path(run_dir) / FILE, json.dumps(content | {"runs": records}, indent=1, allow_nan=False) + "\n")
    picture = sweep_plot.draw(records, sweep.short, sweep.metric)
    (pathlib.Path(run_dir) / "sweep.png").write_bytes(picture)
    show(records, sweep.short, sweep.metric)
    missing = f"; {len(planned) - len(finished)} of {len(planned)} runs are not done" * (len(finished) < len(planned))
    print(f"{pathlib.Path(run_dir) / FILE}, and sweep.png beside it{missing}")


def check(planned: list[tuple[Point, Planned]], library: Library) -> None:
    """Loads every point. Raises UserError, before anything runs, for a knob that the experiment does not have or use
    and a value that it refuses."""
    for point, one in planned:
        loaded = library.load(one.experiment, one.overlays, one.bindings)
        for sentence in loaded.experiment.config.unused.values():
            raise UserError(f"the point {point} of the sweep: {sentence}")


def record(finished: Finished, point: Point, run_dir: pathlib.Path) -> dict[str, Any]:
    """One run as JSON; an infinite metric, of a run that diverged, is None."""
    name, seed, experiment = finished.planned.name, finished.planned.seed, finished.experiment
    facts = facts_of(experiment)
    per_step = facts["flops"] / experiment.steps
    path = finished.directory / "metrics.jsonl"
    run = metrics.Run(name, seed, path, experiment.steps, per_step, diverged=finished.diverged)
    measured = metrics.Metrics([run], baseline=name)
    known = [metric for metric in sorted(set(run.names())) if not metric.startswith("eta/")]
    values = {metric: measured.values(metric, name)[seed].low for metric in known}
    return {
        "point": point,
        "seed": experiment.seed,
        "run": str(finished.directory.relative_to(run_dir)),
        "diverged": finished.diverged,
        "facts": facts,
        "metrics": {metric: value if math.isfinite(value) else None for metric, value in values.items()},
    }


def facts_of(experiment: Experiment) -> dict[str, float]:
    """What laws are written in. parameters: those without a vocabulary axis, as scaling laws count them;
    all_parameters; tokens: trained on, all passes; batch_tokens: a step; flops: of the whole training."""
    model = experiment.abstract_model()
    axes_of = flat_axes(model.axes)
    sizes = {path_names(path): leaf.size for path, leaf in jax.tree_util.tree_flatten_with_path(model.params)[0]}
    tokens = experiment.clock.tokens_per_step
    return {
        "parameters": sum(size for path, size in sizes.items() if "vocab" not in axes_of[path]),
        "all_parameters": sum(sizes.values()),
        "tokens": tokens * experiment.steps,
        "batch_tokens": tokens,
        "steps": experiment.steps,
        "flops": experiment.bare().flops_per_token(experiment.sequence_length) * tokens * experiment.steps,
    }


def _refuse_unwritten(sweep: Sweep, records: list[dict[str, Any]]) -> None:
    known = sorted({name for one in records for name in one["metrics"]})
    if known and sweep.metric not in known and any(one["diverged"] is None for one in records):
        raise UserError(f"Sweep.metric names {sweep.metric!r}, which no run writes; there are {', '.join(known)}")


def show(records: list[dict[str, Any]], short: dict[str, str], metric: str) -> None:
    """A table of the points, the best first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        rows.setdefault(repr(one["point"]), []).append(one)
    means = {key: _mean([one["metrics"].get(metric) for one in runs]) for key, runs in rows.items()}
    heads = [*short.values(), metric, "range of seeds", "seeds", "diverged"]
    table = Table(*heads, box=None, padding=(0, 2, 0, 0))
    for key in sorted(rows, key=means.__getitem__):
        runs = rows[key]
        values = [value for one in runs if (value := one["metrics"].get(metric)) is not None]
        spread = f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else "-"
        cells = [str(runs[0]["point"][knob]) for knob in short]
        mean = f"{means[key]:.4f}" if math.isfinite(means[key]) else "diverged"
        table.add_row(*cells, mean, spread, str(len(runs)), str(sum(one["diverged"] is not None for one in runs)))
    Console(highlight=False).print(table)


def _mean(values: list[float | None]) -> float:
    return math.inf if None in values else sum(values) / len(values)
