"""The runs of a sweep as columns that a law can be fitted to."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from maxlike.catalog import nearest
from maxlike.errors import UserError
from maxlike.scaling.optimum import optimum

Columns = dict[str, list[Any]]  # name -> its value in each run


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of a sweep.json. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text())
        return content | {"runs": list(content["runs"]), "short": dict(content["short"]), "planned": content["planned"]}
    except FileNotFoundError:
        raise UserError(f"there is no {path}: run the sweep first, with the same --run_dir") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run the sweep again, its finished runs are kept") from error


class Runs:
    """The runs of a sweep that ended, with everything that is known of each by name: knobs by their short names, facts,
    metrics. short: {knob: its short name}; one that is the name of a fact and says something else is written out."""

    def __init__(self, runs: Sequence[dict[str, Any]], short: dict[str, str]):
        if not runs:
            raise UserError("the sweep has no run that ended, so there is nothing to fit: run it first")
        self.short = {knob: knob if _hidden(knob, name, runs) else name for knob, name in short.items()}
        self.knobs = list(self.short.values())
        points = [{self.short[knob]: value for knob, value in one["point"].items()} for one in runs]
        self.rows = [point | one["facts"] | one["metrics"] for point, one in zip(points, runs)]

    def name(self, name: str, flag: str) -> str:
        """The column that a flag names. Raises UserError where there is none."""
        found = self.short.get(name, name)
        known = list(dict.fromkeys(key for row in self.rows for key in row))
        if found not in known:
            raise UserError(f"{flag} {name}: the sweep has no such column{nearest(name, known)}")
        return found

    def column(self, name: str, flag: str) -> str:
        """The same, of numbers: a law takes no others."""
        found = self.name(name, flag)
        values = [row.get(found) for row in self.rows]
        bad = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v)]
        if bad:
            raise UserError(f"{flag} {name} has the value {bad[0]!r}, and a law needs numbers: take another column")
        return found

    def numbers(self) -> list[str]:
        """The names that `column` takes, but for the metrics."""
        return [name for name in self.rows[0] if "/" not in name and isinstance(self.rows[0][name], int | float)]

    def keep(self, where: Sequence[str]) -> None:
        """Keeps the runs with these values, each written NAME=VALUE."""
        for text in where:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--where {text}: write NAME=VALUE")
            found = self.name(name.strip(), "--where")
            kept = [row for row in self.rows if _equal(row.get(found), value.strip())]
            if not kept:
                values = ", ".join(dict.fromkeys(str(row.get(found)) for row in self.rows))
                raise UserError(f"--where {text}: no run has it; the values of {found} are {values}")
            self.rows = kept

    def settle(self, x: Sequence[str], y: str, others: Literal["refuse", "lowest"], free: Sequence[str] = ()) -> None:
        """Leaves runs that agree in x different in nothing but their seed and the knobs `free`: a law through runs at
        one x that were made differently is about neither."""
        kept = []
        for key, rows in self._groups(x).items():
            made: dict[str, list[dict]] = {}
            for row in rows:
                made.setdefault(repr([row[k] for k in self.knobs if k not in free]), []).append(row)
            if len(made) > 1 and others == "refuse":
                differing = next(k for k in self.knobs if k not in free and len({repr(row[k]) for row in rows}) > 1)
                raise UserError(
                    f"runs at {_words(x, key)} differ in {differing}: add --x {differing}, keep one value with "
                    f"--where {differing}=..., or take the best of them with --others lowest"
                )
            kept += min(made.values(), key=lambda rows: sum(row[y] for row in rows) / len(rows))
        self.rows = kept

    def columns(self, x: Sequence[str], y: str) -> Columns:
        """x by name, and y as 'y'."""
        return {name: [row[name] for row in self.rows] for name in x} | {"y": [row[y] for row in self.rows]}

    def optima(self, x: Sequence[str], y: str, knobs: Sequence[str], within: float) -> Columns:
        """One row a group of runs that agree in x: x, and as 'y' the first knob's value where y is lowest."""
        out: Columns = {name: [] for name in (*x, "y")}
        for key, rows in self._groups(x).items():
            tried = {name: [row[name] for row in rows] for name in knobs}
            try:
                best = optimum(tried, [row[y] for row in rows], within=within)
            except UserError as error:
                raise UserError(f"at {_words(x, key)}: {error}") from None
            print(f"best at {_words(x, key)}: {', '.join(f'{name} {value:.4g}' for name, value in best.items())}")
            for name, value in zip(x, key):
                out[name].append(value)
            out["y"].append(best[knobs[0]])
        return out

    def _groups(self, x: Sequence[str]) -> dict[tuple, list[dict]]:
        groups: dict[tuple, list[dict]] = {}
        for row in self.rows:
            groups.setdefault(tuple(row[name] for name in x), []).append(row)
        return groups


def _hidden(knob: str, name: str, runs: Sequence[dict[str, Any]]) -> bool:
    """Whether a fact of this name has other values than the knob: `steps` of an optimizer's iteration, say."""
    return any(name in one["facts"] and one["facts"][name] != one["point"][knob] for one in runs)


def _equal(value: Any, text: str) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return str(value) == text


def _words(x: Sequence[str], key: tuple) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in zip(x, key))
