"""Values of verdict.json for people: numbers, cells, and the table on the terminal."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

OUTCOME_STYLES = {"holds": "bold blue", "does not hold": "bold red", "cannot tell": "bold yellow"}


def number(x: float) -> str:
    """With four digits, and no more decimals than they need."""
    if x == 0 or not math.isfinite(x):
        return f"{abs(x):g}" if x == 0 else f"{x:g}"
    x = float(f"{x:.4g}")
    if 1e-4 <= abs(x) < 1e5:
        return f"{x:,.{max(0, 3 - math.floor(math.log10(abs(x))))}f}"
    return f"{x:.3e}"


def cell(entry: dict[str, Any]) -> str:
    """The mean over seeds of an arm's metric, or what stands in its way."""
    if entry["mean"] is not None:
        return number(entry["mean"])
    values = list(entry["values"].values())
    bounds = [v[1] for v in values if isinstance(v, list) and v[1] is not None]
    if bounds:
        return f"below {number(max(bounds))} in {len(bounds)} of {len(values)}"
    diverged = sum(value is None for value in values)
    return f"diverged in {diverged} of {len(values)}" if diverged else "unknown"


def difference(entry: dict[str, Any]) -> list[str]:
    """The paired difference from the baseline, then its interval; nothing where there is none."""
    if "difference" not in entry:
        return []
    mean, (low, high) = entry["difference"]["mean"], entry["difference"]["interval"]
    return [_signed(mean)] + ([] if low is None or high is None else [f"{_signed(low)} to {_signed(high)}"])


def _signed(x: float) -> str:
    return f"+{number(x)}" if x > 0 else number(x)


def show(content: dict[str, Any], console: Console | None = None) -> None:
    """Prints a verdict: the criteria, the metrics of each arm, the sentence."""
    console = console or Console()
    console.print(Text(content["claim"], style="italic"))
    rule = Table("criterion", "outcome", "mean", "95 % interval", "claimed", box=None, padding=(0, 2, 0, 0))
    for one in content["rule"]:
        low, high = ("?" if x is None else number(x) for x in one["interval"])
        mean = "?" if one["mean"] is None else number(one["mean"])
        outcome = Text(one["outcome"], style=OUTCOME_STYLES[one["outcome"]])
        rule.add_row(one["sentence"], outcome, mean, f"{low} to {high}", f"{one['side']} {number(one['boundary'])}")
    console.print(rule)
    for table in _by_arm(content, console.width):
        console.print(table)
    console.print(Text(content["sentence"], style=OUTCOME_STYLES[content["verdict"]]))


def _by_arm(content: dict[str, Any], width: int) -> Iterator[Table]:
    """A column for each metric, a row for each arm: as many tables as it takes for whole words in a line's width."""
    gap = 2
    first = max(len(arm) for arm in (*content["arms"], "arm")) + gap
    left, columns = 0, []
    for metric, found in content["metrics"].items():
        cells = [cell(found["arms"][arm]) if arm in found["arms"] else "" for arm in content["arms"]]
        needed = max(map(len, (*metric.split("/"), *cells))) + gap + 1  # the slash that a line of the header ends with
        if columns and needed > left:
            yield _table(content["arms"], columns, gap)
            columns = []
        left = (left if columns else width - first) - needed
        columns.append((metric.replace("/", "/\n"), cells))
    if columns:
        yield _table(content["arms"], columns, gap)


def _table(arms: Iterable[str], columns: list[tuple[str, list[str]]], gap: int) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0))
    table.add_column("arm", no_wrap=True)
    for header, _ in columns:
        table.add_column(header, overflow="fold")
    for arm, *cells in zip(arms, *(cells for _, cells in columns)):
        table.add_row(arm, *cells)
    return table
