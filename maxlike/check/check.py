"""`--job check`: an experiment against itself."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maxlike.catalog import nearest
from maxlike.check import balance, decoding, state, training, transfer
from maxlike.check.subject import DEVICES, Subject
from maxlike.check.variant import Row, broken
from maxlike.errors import Failed, UserError
from maxlike.experiment import Experiment

ROWS: dict[str, Callable[[Subject], Iterator[Row]]] = {
    "mesh": training.meshes,
    "placed": state.placed,
    "kernels": training.implementations,
    "packed": training.packed,
    "scan": training.scan,
    "remat": training.remat,
    "accumulation": training.accumulation,
    "balance": balance.balance,
    "resume": state.resume,
    "decode": decoding.decode,
    "recurrent": decoding.recurrent,
    "export": transfer.export,
}


def check(experiment: Experiment, run_dir: pathlib.Path, *, rows: str | None = None) -> None:
    """Shrinks the experiment (widths, depth, vocabulary, batch, length; same classes and knobs), computes it on 8
    simulated devices in two ways for each row of a table, and names the first tensor that departs.

    rows: which rows, with commas between them, such as `packed,scan,mesh/fsdp`; by default all of them.
        mesh: every overlay of several devices against one device; placed: every moment cut as its parameter;
        kernels: implementations against the plainest; packed: against separate documents; scan: against unrolled;
        remat: against keeping all; accumulation: against one batch; balance: an overloaded expert's bias falls;
        resume: restored against straight on, bit for bit; decode: a cache against the whole row; recurrent: token by
        token against the row at once; export: Hugging Face files written and read.

    Losses and gradients may differ by 1e-5 of a tensor's magnitude, and by more only where a move of the parameters by
    their last bit does as much to the same twin: then the row says so.

    Data are made-up documents; the experiment's own transforms are not run. A row that cannot be run is listed with the
    reason. Ends with exit code 1 where a row fails. The twin's gin file, the table, and the traceback of a row that
    broke lie in RUN_DIR/check.
    """
    if jax.default_backend() != "cpu" or jax.device_count() < DEVICES[0]:
        raise UserError(
            f"check needs {DEVICES[0]} simulated CPU devices, found {jax.device_count()} ({jax.default_backend()}): "
            f"start it by `python -m launch`, or set XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES[0]}"
        )
    wanted = tuple(name.strip() for name in rows.split(",")) if rows else ()
    for name in wanted:
        if name.split("/")[0] not in ROWS:
            raise UserError(f"--rows names {name!r}{nearest(name, ROWS)}; rows are {', '.join(ROWS)}")
    folder = pathlib.Path(run_dir) / "check"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = run(
        experiment, folder, wanted, lambda row: print(f"{row.name}: {row.verdict}", file=sys.stderr, flush=True)
    )
    for name in wanted:
        if not any(row.name == name or row.name.startswith(f"{name}/") for row in found):
            known = ", ".join(row.name for row in found) or f"those of {name.split('/')[0]}, without a name behind it"
            raise UserError(f"--rows names {name!r}, which this experiment has not; it has {known}")
    _show(experiment, folder, found)
    print(f"{len(found)} rows in {time.monotonic() - began:.0f} s")
    failed = [row.name for row in found if row.failed]
    if failed:
        raise Failed(f"{len(failed)} of {len(found)} rows do not hold: {', '.join(failed)}; see {folder / 'table.txt'}")


def run(
    experiment: Experiment,
    folder: pathlib.Path,
    wanted: tuple[str, ...] = (),
    done: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The rows of an experiment; `folder` must exist. wanted: names as for `check`, empty for all. done: called with
    each row when it is known."""
    logging.get_absl_logger().setLevel(logging.WARNING)
    subject = Subject(experiment, folder, wanted)
    found = []
    for group in ROWS:
        for row in _group(subject, group) if subject.wants_some(group) else ():
            found.append(row)
            done(row)
    return found


def _group(subject: Subject, group: str) -> Iterator[Row]:
    """The rows of one group, and one more where looking for them raises an exception."""
    try:
        yield from ROWS[group](subject)
    except Exception as error:
        yield broken(group, "", error)


def _show(experiment: Experiment, folder: pathlib.Path, rows: list[Row]) -> None:
    """Prints the table, and writes it as text and as JSON."""
    title = f"{experiment.config.name}: its small twin ({folder / 'small.gin'}) against itself, {DEVICES[0]} devices"
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("row", "compared", "difference", "tolerance", "verdict", "first tensor that departs, or a remark"):
        table.add_column(column, justify="right" if column in ("difference", "tolerance") else "left", overflow="fold")
    for row in rows:
        numbers = ("", "") if row.result is None else (_number(row.result.largest), _number(row.result.tolerance))
        table.add_row(row.name, row.compared, *numbers, row.verdict, Text(row.note))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=200, highlight=False).print(table)
    body = [
        {
            "row": row.name,
            "compared": row.compared,
            "difference": None if row.result is None or not math.isfinite(row.result.largest) else row.result.largest,
            "tolerance": None if row.result is None else row.result.tolerance,
            "verdict": row.verdict,
            "note": row.note,
        }
        for row in rows
    ]
    (folder / "table.json").write_text(json.dumps(body, indent=1) + "\n")
    traces = "\n\n".join(f"{row.name}\n{row.trace}" for row in rows if row.trace)
    (folder / "traceback.txt").write_text(traces)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
