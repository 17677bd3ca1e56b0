"""Progress: one line over many runs."""

import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.text import Text

from maxlike.console import Console, LiveLine, Start, duration


class Progress:
    """How many runs are done, which one is being trained, and when all will be.

    flops: of all runs to be made, for the ETA. Seconds for a FLOP are measured as the runs go: of those that are over
        with all that they spent beside their steps, of the one in progress from its first step.
    runs: how many there are in all; done: how many were there before.
    file, plain, clock: see `LiveLine`.
    """

    def __init__(
        self,
        *,
        flops: float,
        runs: int,
        done: int,
        file: TextIO | None = None,
        plain: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._flops, self._runs, self._done, self._clock = flops, runs, done, clock
        self._gone = 0.0  # FLOPs of runs that are over
        self._measured = self._seconds = 0.0  # of them, FLOPs that were spent here, and what they took
        self._now: tuple[str, float, int] | None = None  # name, FLOPs and steps of the run in progress
        self._began = self._stepping = 0.0  # when it did, and when its first step was over
        self._first = self._step = 0
        self._loss: float | None = None
        self._lock = threading.Lock()
        self._live = LiveLine(self._line, file=file, plain=plain, clock=clock)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()

    def say(self, sentence: str) -> None:
        """A sentence above the line."""
        self._live.say(sentence)

    def begin(self, name: str, flops: float, steps: int, log: pathlib.Path) -> "RunScreen":
        """The screen of the next run, which costs so many FLOPs; its own words go to the file `log`."""
        with self._lock:
            self._now, self._first, self._step, self._loss = (name, flops, steps), 0, 0, None
            self._began = self._clock()
        return RunScreen(self, steps, log)

    def stepped(self, step: int, values: Mapping[str, float | None]) -> None:
        """Steps of the run in progress."""
        with self._lock:
            if not self._first:
                self._first, self._stepping = step, self._clock()
            self._step, self._loss = step, values.get("loss", self._loss)
        self._live.changed()

    def end(self, sentence: str) -> None:
        """The run in progress is over; `sentence` says how."""
        with self._lock:
            _, flops, steps = self._now
            self._gone += flops
            self._measured += flops * (self._step - self._first + 1) / steps if self._first else 0.0
            self._seconds += self._clock() - self._began
            self._now, self._done = None, self._done + 1
        self.say(f"{self._done}/{self._runs}  {sentence}")

    @property
    def eta(self) -> float | None:
        """Seconds until all runs are done; None before anything is measured."""
        with self._lock:
            gone, measured, seconds = self._gone, self._measured, self._seconds
            if self._now is not None and self._first:
                _, flops, steps = self._now
                gone += flops * self._step / steps
                measured += flops * (self._step - self._first) / steps
                seconds += self._clock() - self._stepping
            return seconds * (self._flops - gone) / measured if measured > 0 else None

    def _line(self) -> Text:
        eta = self.eta
        with self._lock:
            if self._now is None:
                return Text(f"{self._done}/{self._runs} runs done")
            name, _, steps = self._now
            parts = [f"{self._done}/{self._runs} runs done", name, f"step {self._step:,}/{steps:,}"]
            parts += [f"loss {self._loss:.4f}"] if self._loss is not None else []
        parts += [f"ETA {duration(eta)}"] if eta is not None else []
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


class RunScreen:
    """The screen of one run among many: its words go to a file, its steps to the line over all runs."""

    def __init__(self, progress: Progress, steps: int, log: pathlib.Path):
        self._progress = progress
        self._file = log.open("a", encoding="utf-8")
        self._console = Console(steps=steps, file=self._file)

    def start(self, start: Start) -> None:
        self._console.start(start)

    def say(self, sentence: str) -> None:
        self._console.say(sentence)
        self._file.flush()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        self._console.update(step, values)
        self._progress.stepped(step, values)

    def close(self) -> None:
        self._console.close()
        self._file.close()
