"""`--job law`: a law fitted to a finished sweep."""

import json
import pathlib
from typing import Literal

from maxlike.errors import UserError
from maxlike.manifest import write_text
from maxlike.scaling import forms, law_plot, sweep_job
from maxlike.scaling.columns import Columns, Runs, read
from maxlike.scaling.fit import fit
from maxlike.scaling.law import Law, Prediction
from maxlike.scaling.sweep import Sweep


def law(
    sweep: Sweep,
    run_dir: pathlib.Path,
    *,
    y: str | None = None,
    x: tuple[str, ...] = (),
    form: str = "power",
    at: tuple[str, ...] = (),
    where: tuple[str, ...] = (),
    others: Literal["refuse", "lowest"] = "refuse",
    optimum: tuple[str, ...] = (),
    within: float = 0.02,
    huber: float = 1e-3,
    resample: Literal["points", "seeds"] = "points",
) -> None:
    """Fits a law to the runs in RUN_DIR/sweep.json; prints it with 95 % intervals, writes law.json and law.png.

    y: a metric, by default the sweep's. x: a knob of the sweep, or of the runs: parameters (without embeddings),
    all_parameters, tokens, batch_tokens, steps, flops; repeatable. form: power (y = a x^b), power+floor (+ c) or
    chinchilla (E + A / N^alpha + B / D^beta, for two x). at: a point to predict, such as "parameters=1e9,tokens=2e10";
    repeatable. where: NAME=VALUE, keeps the runs that have it; repeatable. others: runs that agree in x and differ in
    another knob are refused, or the lowest y of them is taken. optimum: a knob; the law is then of its best value,
    where y is lowest, in each group of runs that agree in x; a second one is minimised along with it. within: share
    above a group's lowest y up to which runs count for that. huber: residual of log y above which a point counts less;
    inf is least squares. resample: what the bootstrap draws, points or the seeds in each.
    """
    del sweep  # its name found the directory; what was run is in there
    run_dir = pathlib.Path(run_dir)
    content = read(run_dir / sweep_job.FILE)
    ended = [one for one in content["runs"] if one["diverged"] is None]
    if len(ended) < len(content["runs"]):
        print(f"{len(content['runs']) - len(ended)} of {len(content['runs'])} runs diverged and are left out")
    if len(content["runs"]) < content["planned"]:
        print(f"{content['planned'] - len(content['runs'])} of {content['planned']} runs are not done yet")
    runs = Runs(ended, content["short"])
    runs.keep(where)
    if not x:
        raise UserError(f"which variable? give --x NAME; there are {', '.join(sorted(runs.numbers()))}")
    x = tuple(runs.column(name, "--x") for name in x)
    y = runs.column(content["metric"] if y is None else y, "--y")
    knobs = tuple(runs.column(name, "--optimum") for name in optimum)
    runs.settle(x, y, others, free=knobs)
    points = runs.optima(x, y, knobs, within) if knobs else runs.columns(x, y)
    of = f"best {knobs[0]}" if knobs else y
    fitted = fit(forms.of_name(form, x), points, points["y"], huber=huber, resample=resample)
    places = [parse_point(text, x) for text in at]
    predictions = [fitted.predict(place) for place in places]
    for line in fitted.sentences(of):
        print(line)
    for place, prediction in zip(places, predictions):
        print(f"{of} at {', '.join(f'{name} = {value:g}' for name, value in place.items())}: {prediction}")
    _write(run_dir, of, fitted, points, places, predictions)


def _write(
    run_dir: pathlib.Path, y: str, fitted: Law, points: Columns, places: list[dict], predictions: list[Prediction]
) -> None:
    content = {
        "y": y,
        "law": fitted.record(),
        "fitted": points,
        "predictions": [{"at": place} | prediction.record() for place, prediction in zip(places, predictions)],
    }
    write_text(run_dir / "law.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    (run_dir / "law.png").write_bytes(law_plot.draw(fitted, points, y, places))
    print(f"{run_dir / 'law.json'}, and law.png beside it")


def parse_point(text: str, x: tuple[str, ...]) -> dict[str, float]:
    """'parameters=1e9,tokens=2e10' as numbers."""
    point = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            point[x[x.index(name.strip())]] = float(value)
        except ValueError:
            raise UserError(f"--at {text!r}: write {','.join(f'{one}=NUMBER' for one in x)}") from None
    return point
