"""What a measurement leaves behind: one JSON record a benchmark and kind of device, and a table made from them."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import operator
import os
import pathlib
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from maxlike.errors import UserError

BEGIN, END = "<!-- records -->", "<!-- end of records -->"
_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One measured number with its repetitions.

    goal: a comparison with the median, such as "<= 1.0", or "" where nothing was promised.
    """

    name: str
    unit: str
    values: Sequence[float]
    goal: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median keeps the goal; None without a goal."""
        if not self.goal:
            return None
        compare, limit = self.goal.split()
        return _COMPARE[compare](self.median, float(limit))

    def plain(self) -> dict[str, Any]:
        spread = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        told = {"name": self.name, "unit": self.unit, "goal": self.goal, "met": self.met}
        return told | spread | {"values": list(self.values)}


@dataclasses.dataclass(frozen=True)
class Result:
    """A benchmark's outcome. device: a short word for the file name; details: plain values worth keeping."""

    benchmark: str
    device: str
    quantities: Sequence[Quantity]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def surroundings() -> Iterator[dict[str, Any]]:
    """Fills a dict with what the numbers depend on; the load of the machine before and after is measured around."""
    found: dict[str, Any] = {"load_before": _load()}
    yield found
    found |= {
        "load_after": _load(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "launch", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        "processor": _processor(),
        "cores": cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _load() -> float:
    """Processes that ran or waited in the last minute, on average."""
    return round(os.getloadavg()[0], 2)


def _commit() -> str:
    """The revision of the checkout, with + where it has changes; empty outside a checkout."""
    here = pathlib.Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return revision.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found.group(1)
    return platform.processor()


def write(result: Result, environment: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """The record `folder/records/BENCHMARK-DEVICE.json`; a table in `folder/README.md` is brought up to date."""
    records = folder / "records"
    records.mkdir(parents=True, exist_ok=True)
    path = records / f"{result.benchmark}-{result.device}.json"
    content = {
        "benchmark": result.benchmark,
        "device": result.device,
        "quantities": [quantity.plain() for quantity in result.quantities],
        "details": result.details,
        "environment": environment,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    update(folder / "README.md")
    return path


def table(folder: pathlib.Path) -> str:
    """All records under `folder/records` as a Markdown table."""
    lines = [
        "| benchmark | device | quantity | median (least to most) | goal | load | when, commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted((folder / "records").glob("*.json")):
        record = json.loads(path.read_text())
        around = record["environment"]
        for quantity in record["quantities"]:
            verdict = {None: "", True: f"{quantity['goal']}: met", False: f"{quantity['goal']}: **not met**"}
            number, least, most = (_number(quantity[name]) for name in ("median", "least", "most"))
            told = f"{number} {quantity['unit']}".strip()
            lines.append(
                f"| {record['benchmark']} | {record['device']} | {quantity['name']} "
                f"| {told} ({least} to {most}, n={len(quantity['values'])}) "
                f"| {verdict[quantity['met']]} | {around['load_before']} to {around['load_after']} "
                f"| {around['date'][:10]}, {around['commit']} |"
            )
    return "\n".join(lines)


def update(readme: pathlib.Path) -> None:
    """Puts the table of the records beside it into a README that has the two marks; leaves any other alone."""
    if not readme.is_file():
        return
    text = readme.read_text()
    if BEGIN not in text:
        return
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise UserError(f"{readme} has {BEGIN} without {END}: put the second mark behind the table")
    readme.write_text(f"{before}{BEGIN}\n{table(readme.parent)}\n{END}{rest.split(END)[1]}")


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
