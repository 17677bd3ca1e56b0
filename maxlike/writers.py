"""Where metrics go: `metrics.jsonl`, which scripts read, and TensorBoard events, which people look at."""

import json
import math
import os
from collections.abc import Callable
from typing import Literal

from absl import logging

from maxlike.events import Events
from maxlike.run_dir import RunDirectory

Value = float | int | str | list[float] | None


class MetricsWriter:
    """Appends to the metrics of a run; one object a line, on disk as soon as `write` returns.

    A disk that is full does not stop the run: the lines wait in memory for the next `write`, and `say` is told once.
    Only the owner of the run directory may have one.
    """

    def __init__(self, run: RunDirectory, *, say: Callable[[str], None] = logging.warning):
        self._path = run.metrics
        self._say = say
        self._waiting: list[bytes] = []
        self._failing = False
        self._file = self._path.open("ab", buffering=0)
        self._events = Events(run.events, say)

    def write(self, step: int, split: Literal["train", "validation", "measured"], values: dict[str, Value]) -> None:
        """One line. Values are numbers, lists of them (one a layer), text or None; what is not finite is written as
        null (JSON has no NaN). TensorBoard gets one curve for each number of a list."""
        record = {"step": int(step), "split": split} | {name: _json_value(value) for name, value in values.items()}
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._flush()
        scalars = {}
        for name, value in values.items():
            if isinstance(value, list):
                scalars |= {f"{split}/{name}/{index:02}": float(x) for index, x in enumerate(value)}
            elif value is not None and not isinstance(value, str):
                scalars[f"{split}/{name}"] = float(value)
        self._events.write(step, scalars)

    def truncate(self, step: int) -> None:
        """Forgets what was written after `step`, and a last line cut short by a kill, so that a run resumed from the
        checkpoint of `step` has each step once. The file is replaced whole; TensorBoard is told to forget as well."""
        self._file.close()
        kept = b"".join(line for line in self._path.read_bytes().splitlines(keepends=True) if _belongs(line, step))
        temporary = self._path.with_name(".metrics.partial")
        with temporary.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._waiting = [line for line in self._waiting if _belongs(line, step)]
        self._file = self._path.open("ab", buffering=0)
        self._events.forget_after(step)

    def close(self) -> None:
        self._flush()
        self._file.close()
        self._events.close()

    def _flush(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        block = b"".join(self._waiting)
        try:
            if self._file.write(block) != len(block):
                raise OSError("the disk took a part of a line only")
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            if not self._failing:
                self._say(f"{self._path} cannot be written ({error}): the metrics wait in memory; free some space")
            self._failing = True
            return
        self._waiting = []
        self._failing = False


def _json_value(value: Value) -> Value:
    if isinstance(value, list):
        return [_json_value(x) for x in value]
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)  # also of NumPy and jax scalars
    return number if math.isfinite(number) else None


def _belongs(line: bytes, step: int) -> bool:
    """Whether a line is whole and of `step` or before."""
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
