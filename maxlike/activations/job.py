"""`--job measure`: statistics of the activations of a trained run."""

import json
import pathlib

from rich.console import Console
from rich.table import Table

from maxlike.activations.gates import Gates
from maxlike.activations.kurtosis import Kurtosis
from maxlike.activations.layer_cosine import LayerCosine
from maxlike.activations.norms import Norms
from maxlike.activations.sink import AttentionSink
from maxlike.activations.statistic import Passes, Statistic, Values
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.restore import restore
from maxlike.run_dir import RunDirectory

STATISTICS = (Kurtosis, Norms, AttentionSink, Gates, LayerCosine)


def measure(
    experiment: Experiment,
    run_dir: pathlib.Path,
    *,
    rows: int = 32,
    single_token: bool = False,
    checkpoint: int | None = None,
) -> Values:
    """Kurtosis, norms, attention sink, gates and the layers' cosines of a run's checkpoint, as a table by layer and in
    `measured.json`.

    rows: of the validation split, >= 1. single_token: the kurtosis of each token alone in its row too, which is what
    the outlier-safe paper's script computes. checkpoint: the step to measure; by default the newest. A statistic that
    the network has nothing for is left out, and the table says why.
    """
    asked: list[Statistic] = [kind(rows=rows) for kind in STATISTICS]
    if single_token:
        asked.append(Kurtosis(rows=rows, context="single_token"))
    fitting, reasons = [], []
    for statistic in asked:
        try:
            statistic.check(experiment)
            fitting.append(statistic)
        except UserError as refusal:
            reasons.append(str(refusal))
    if not fitting:
        raise UserError(reasons[0])
    program, state, step = restore(experiment, run_dir, checkpoint)
    values = Passes(tuple(fitting))(experiment, program, state)
    rows = min(rows, experiment.open_validation().rows)
    found = {"step": step, "rows": rows, "values": values, "left_out": reasons}
    path = RunDirectory(run_dir, mode="read").write_text("measured.json", json.dumps(found, indent=1) + "\n")
    _show(values, reasons, f"step {step}, {rows} rows of the validation split")
    print(f"measured: {path}")
    return values


def _show(values: Values, reasons: list[str], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("statistic", "value", "each layer"):
        table.add_column(column, overflow="fold")
    for name, value in values.items():
        if not isinstance(value, list):
            each = values.get(f"{name}/each", [])
            table.add_row(name, f"{value:.4g}", " ".join(f"{x:.3g}" for x in each))
    console = Console()
    console.print(table)
    for reason in reasons:
        console.print(f"left out: {reason}")
