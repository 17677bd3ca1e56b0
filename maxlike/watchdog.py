"""A watchdog over the training loop: a step that takes far longer than the others leaves a record of why.

The loop tells in which phase it is (`with watch("data", step): ...`). Phases go into a ring buffer, like those of
TorchTitan's flight recorder, and a thread compares the time of the current one with a limit.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from maxlike.collectives import collectives
from maxlike.errors import TRY_AGAIN, UserError
from maxlike.manifest import write_text

RING = 20_000  # phases that are remembered
_USUAL = 101  # steps over which the median is taken
_STEPPING = ("data", "step", "sync")  # phases that the limit of a step holds for; the others are beside the steps


class Watchdog:
    """Limits of the watchdog, and whether it ends a run that stands still.

    factor: a step, or its wait for data, is late after `factor` times the median of the last 101 steps, > 1,
    floor: but not before so many seconds, > 0: what a step may lose to a busy host or file system without a record.
    first: seconds that the first step may take, >= floor.
    beside: seconds that a checkpoint, a validation or another hook may take, >= floor.
    abort: end the process with exit code 75 after the record is written; the other processes then stop too, and the
        same command goes on from the last checkpoint. False: write the record and go on waiting.

    Raises UserError for values out of range.
    """

    def __init__(
        self,
        *,
        factor: float = 10.0,
        floor: float = 10.0,
        first: float = 300.0,
        beside: float = 1800.0,
        abort: bool = False,
    ):
        if factor <= 1 or floor <= 0:
            raise UserError(f"Watchdog.factor={factor}, Watchdog.floor={floor}: give a factor above 1, and seconds")
        if min(first, beside) < floor:
            raise UserError(
                f"Watchdog.first={first}, Watchdog.beside={beside}: neither may be below Watchdog.floor={floor}"
            )
        self.factor, self.floor, self.first, self.beside, self.abort = factor, floor, first, beside, abort

    def over(
        self, folder: pathlib.Path, step: jax.stages.Compiled, mesh: jax.sharding.Mesh, say: Callable[[str], None]
    ) -> "Watch":
        """A watch over one loop. folder: where records go, made when the first is written. step: the compiled step,
        whose collectives enter the record. say: gets one line for every record, from another thread."""
        return Watch(self, folder, step, mesh, say)


class Watch:
    """See `Watchdog`. Use as `with watchdog.over(...) as watch`, and `with watch(phase, step)` inside."""

    def __init__(
        self,
        limits: Watchdog,
        folder: pathlib.Path,
        step: jax.stages.Compiled,
        mesh: jax.sharding.Mesh,
        say: Callable[[str], None],
    ):
        self._limits, self._folder, self._compiled, self._mesh, self._say = limits, folder, step, mesh, say
        self._ring: collections.deque[tuple[str, int, float, float]] = collections.deque(maxlen=RING)
        self._steps: collections.deque[float] = collections.deque(maxlen=_USUAL)
        self._waited = 0.0  # seconds this step has waited for its data
        self._now: tuple[str, int, float, float] | None = None  # phase, step, when it began, its limit
        self._told: tuple[str, int, float, float] | None = None  # the late phase that was told last
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def __call__(self, phase: str, step: int) -> Iterator[None]:
        """Around one phase of the loop: 'data' and then 'step' in every step, 'sync' where it waits for steps already
        under way, any other name beside the steps."""
        began = time.monotonic()
        self._now = now = (phase, step, began, self._limit(phase))
        try:
            yield
        finally:
            self._now = None
            took = time.monotonic() - began
            self._ring.append((phase, step, began, took))
            if phase == "data":
                self._waited = took
            elif phase == "step":
                self._steps.append(self._waited + took)
                self._waited = 0.0
            if self._told is now:
                self._say(f"step {step} went on after {took:.1f} s")

    def _limit(self, phase: str) -> float:
        if phase not in _STEPPING:
            return self._limits.beside
        if not self._steps:
            return self._limits.first
        return max(self._limits.factor * statistics.median(self._steps), self._limits.floor)

    def _look(self) -> None:
        interval = min(self._limits.floor / 4, 1.0)
        while not self._over.wait(interval):
            # Should a thread hang without letting go of the interpreter, this one hangs too: C code then prints stacks.
            faulthandler.dump_traceback_later(self._limits.first, exit=self._limits.abort, file=sys.__stderr__)
            now = self._now
            if now is not None and now is not self._told and time.monotonic() - now[2] > now[3]:
                self._report(*now)
                self._told = now
        faulthandler.cancel_dump_traceback_later()

    def _report(self, phase: str, step: int, began: float, limit: float) -> None:
        waited = time.monotonic() - began
        process = jax.process_index()
        record: dict[str, Any] = {
            "process": process,
            "host": socket.gethostname(),
            "phase": phase,
            "step": step,
            "seconds": waited,
            "limit": limit,
            "median_step": statistics.median(self._steps) if self._steps else None,
            "stacks": _stacks(),
            "memory": {str(device): device.memory_stats() for device in jax.local_devices()},
            "phases": [
                {"phase": name, "step": at, "seconds_ago": time.monotonic() - start, "took": took}
                for name, at, start, took in list(self._ring)
            ],
        }
        path = self._folder / f"process_{process}_step_{step}_{phase}.json"
        kept = f"stacks, phases, collectives and memory are in {path}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record, indent=1))  # before anything that a device which hangs could hold up
            record["collectives"] = self._collectives()
            write_text(path, json.dumps(record, indent=1))
        except OSError as error:  # the disk may be what the step waits for
            kept = f"its record could not be written to {path} ({error.strerror})"
        then = "; ending this process, as Watchdog.abort asks" if self._limits.abort else ""
        self._say(
            f"step {step} has been waiting {waited:.1f} s for {_NAMES.get(phase, phase)} (limit {limit:.1f} s): "
            f"{kept}{then}"
        )
        if self._limits.abort:
            os._exit(TRY_AGAIN)

    def _collectives(self) -> list[dict] | str:
        try:
            found = collectives(self._compiled.as_text(), self._mesh)
            return [dataclasses.asdict(collective) for collective in found]
        except Exception as error:  # whatever it is: this thread has yet to speak, and to end the process where asked
            return f"{type(error).__name__}: {error}"


_NAMES = {
    "data": "its batch",
    "step": "the devices",
    "sync": "the steps before it",
    "checkpoint": "its checkpoint",
    "hooks": "its hooks",
}


def _stacks() -> dict[str, list[str]]:
    """The Python stack of every thread, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(identity, 'not a Python thread')} ({identity})": [
            line for entry in traceback.format_stack(frame) for line in entry.rstrip().split("\n")
        ]
        for identity, frame in sys._current_frames().items()
    }
