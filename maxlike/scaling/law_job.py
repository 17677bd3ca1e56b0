"""`--job law`: a law fitted to a finished sweep."""

import json
import math
import pathlib
from typing import Any, Literal

from maxlike.catalog import nearest
from maxlike.errors import UserError
from maxlike.manifest import write_text
from maxlike.scaling import forms, law_plot, sweep_job
from maxlike.scaling.fit import fit
from maxlike.scaling.law import Law, Prediction
from maxlike.scaling.optimum import optimum as best_of
from maxlike.scaling.sweep import Sweep

Columns = dict[str, list[Any]]  # name -> its value in each run


def law(
    sweep: Sweep,
    run_dir: pathlib.Path,
    *,
    y: str | None = None,
    x: tuple[str, ...] = (),
    form: str = "power",
    at: tuple[str, ...] = (),
    optimum: tuple[str, ...] = (),
    within: float = 0.02,
    huber: float = 1e-3,
    resample: Literal["points", "seeds"] = "points",
    seed: int = 0,
) -> None:
    """Fits a law to the runs in RUN_DIR/sweep.json; prints it with 95 % intervals, writes law.json and law.png.

    y: a metric, by default the sweep's. x: a knob of the sweep, or of the runs: parameters (without embeddings),
    all_parameters, tokens, batch_tokens, steps, flops; repeatable. form: power (y = a x^b), power+floor (+ c) or
    chinchilla (E + A / N^alpha + B / D^beta, for two x). at: a point to predict, such as "parameters=1e9,tokens=2e10";
    repeatable. optimum: a knob; the law is then of its best value, where y is lowest, in each group of runs that agree
    in x; a second one is minimised along with it. within: share above a group's lowest y up to which runs count for
    that. huber: residual of log y above which a run counts less; inf is least squares. resample: what the bootstrap
    draws, points or the seeds in each. seed: of the bootstrap.
    """
    content = read(pathlib.Path(run_dir) / sweep_job.FILE)
    runs = [one for one in content["runs"] if one["diverged"] is None]
    left = len(content["runs"]) - len(runs)
    if left:
        print(f"{left} of {len(content['runs'])} runs diverged and are left out")
    columns, names = columns_of(runs), content["short"] | {name: name for name in content["short"].values()}
    y = content["metric"] if y is None else y
    x = tuple(_known(name, columns, names, "--x") for name in x)
    if not x:
        raise UserError(f"which variable? give --x NAME; there are {', '.join(sorted(_numbers(columns)))}")
    wanted = {name: columns[name] for name in x} | {"y": columns[_known(y, columns, names, "--y")]}
    if optimum:
        knobs = tuple(_known(name, columns, names, "--optimum") for name in optimum)
        wanted = optima(wanted, {name: columns[name] for name in knobs}, x, within)
        y = f"best {knobs[0]}"
    fitted = fit(forms.of_name(form, x), wanted, wanted["y"], huber=huber, resample=resample, seed=seed)
    places = [parse_point(text, x) for text in at]
    predictions = [fitted.predict(place) for place in places]
    for line in fitted.sentences(y):
        print(line)
    for place, prediction in zip(places, predictions):
        print(f"{y} at {', '.join(f'{name} = {value:g}' for name, value in place.items())}: {prediction}")
    _write(pathlib.Path(run_dir), y, fitted, wanted, places, predictions)


def _write(
    run_dir: pathlib.Path, y: str, fitted: Law, points: Columns, places: list[dict], predictions: list[Prediction]
) -> None:
    content = {
        "y": y,
        "law": fitted.record(),
        "fitted": points,
        "predictions": [{"at": place} | vars(prediction) for place, prediction in zip(places, predictions)],
    }
    write_text(run_dir / "law.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    (run_dir / "law.png").write_bytes(law_plot.draw(fitted, points, y, places))
    print(f"{run_dir / 'law.json'}, and law.png beside it")


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of a sweep.json. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text())
        return content | {"runs": list(content["runs"]), "short": dict(content["short"])}
    except FileNotFoundError:
        raise UserError(f"there is no {path}: run the sweep first, with the same --run_dir") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run the sweep again, its finished runs are kept") from error


def columns_of(runs: list[dict[str, Any]]) -> Columns:
    """Every value by name: knobs by their short names and their own, facts, metrics."""
    if not runs:
        raise UserError("the sweep has no run that ended, so there is nothing to fit: run it first")
    rows = [one["point"] | one["facts"] | one["metrics"] for one in runs]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def optima(wanted: Columns, knobs: Columns, x: tuple[str, ...], within: float) -> Columns:
    """One row a group of runs that agree in x: x, and as y the first knob's best value."""
    groups: dict[tuple, list[int]] = {}
    for index, key in enumerate(zip(*(wanted[name] for name in x))):
        groups.setdefault(key, []).append(index)
    out: Columns = {name: [] for name in (*x, "y")}
    for key, rows in groups.items():
        tried = {name: [values[row] for row in rows] for name, values in knobs.items()}
        where = ", ".join(f"{name} = {value:g}" for name, value in zip(x, key))
        try:
            best = best_of(tried, [wanted["y"][row] for row in rows], within=within)
        except UserError as error:
            raise UserError(f"at {where}: {error}") from None
        print(f"best at {where}: {', '.join(f'{name} {value:.4g}' for name, value in best.items())}")
        for name, value in zip(x, key):
            out[name].append(value)
        out["y"].append(best[next(iter(knobs))])
    return out


def parse_point(text: str, x: tuple[str, ...]) -> dict[str, float]:
    """'parameters=1e9,tokens=2e10' as numbers. A variable may be named by its last part."""
    point = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        found = [one for one in x if one == name.strip() or one.replace("/", ".").split(".")[-1] == name.strip()]
        try:
            point[found[0]] = float(value)
        except (ValueError, IndexError):
            raise UserError(f"--at {text!r}: write {','.join(f'{one}=NUMBER' for one in x)}") from None
    return point


def _numbers(columns: Columns) -> list[str]:
    return [n for n, v in columns.items() if all(isinstance(e, int | float) and not isinstance(e, bool) for e in v)]


def _known(name: str, columns: Columns, names: dict[str, str], flag: str) -> str:
    """The column that a flag names, by its whole name or a knob's short one."""
    by_short = {short: knob for knob, short in names.items() if knob in columns}
    found = name if name in columns else by_short.get(name)
    if found is None:
        raise UserError(f"{flag} {name}: the sweep has no such column{nearest(name, [*columns, *by_short])}")
    bad = [value for value in columns[found] if not isinstance(value, int | float) or not math.isfinite(value)]
    if bad:
        raise UserError(f"{flag} {name} has the value {bad[0]!r}, and a law needs numbers: take another column")
    return found
