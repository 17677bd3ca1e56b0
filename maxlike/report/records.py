"""Reading metrics.jsonl back: series of numbers by name and split."""

import json
import math
import pathlib

import numpy as np

Series = tuple[np.ndarray, np.ndarray]  # x, y


def read(path: pathlib.Path) -> list[dict]:
    """The records of a metrics file; none where there is no file. A line cut short by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def series(records: list[dict], split: str, name: str, x: str = "step") -> Series:
    """(x, value) of every record of a split that has both as finite numbers, in order of x."""
    points = [
        (record[x], record[name])
        for record in records
        if record.get("split") == split and _is_number(record.get(name)) and _is_number(record.get(x))
    ]
    points.sort(key=lambda point: point[0])
    xs, ys = zip(*points) if points else ((), ())
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    end = np.arange(1, len(y) + 1)
    start = np.maximum(end - window, 0)
    return (sums[end] - sums[start]) / (end - start)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
