"""What a person sees of a run: one table at the start, one live line while it trains, plain lines in a log file."""

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from rich.console import Console as Rich
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maxlike.decode.cache_size import CacheSize
from maxlike.mfu import CONVENTION, peak_flops


@dataclasses.dataclass(frozen=True)
class Start:
    """What the start table shows.

    parameters, active: counts; active is what one token uses (less than all with experts).
    flops_per_token: training FLOPs by the convention of `maxlike.mfu`. mesh: {axis: size}. batch_tokens: tokens a step.
    memory: predicted bytes a device, or None where the compiler does not tell. device_kind, devices: what is in use;
    idle: further devices, which the mesh leaves out. cache: of decoding, one row.
    kernels: (operation, implementation, reason). sources: (name, tokens, share of the mixture or None).
    """

    parameters: int
    active: int
    flops_per_token: float
    mesh: Mapping[str, int]
    batch_tokens: int
    memory: float | None
    device_kind: str
    devices: int
    idle: int
    cache: CacheSize
    kernels: tuple[tuple[str, str, str], ...]
    sources: tuple[tuple[str, int, float | None], ...]


class Screen(Protocol):
    """Where a person looks while an experiment trains."""

    def start(self, start: Start) -> None:
        """The table of the start."""

    def say(self, sentence: str) -> None:
        """A sentence: a failure, a fallback, a sample."""

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """The state of the run after `step` updates, see `Console.update`."""

    def close(self) -> None:
        """After the last word."""


class LiveLine:
    """One line that is kept up to date on a terminal, and printed now and then where there is none.

    render: the line as it is now; called by a thread. file: where to print; None is stdout.
    redraw: seconds between redraws on a terminal. plain: seconds between lines where the output is not a terminal,
    which gets no control characters. clock: monotonic seconds. Methods may be called from any thread.
    """

    def __init__(
        self,
        render: Callable[[], Text],
        *,
        file: TextIO | None = None,
        redraw: float = 0.25,
        plain: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rich = Rich(file=file, highlight=False)
        self._render, self._plain, self._clock = render, plain, clock
        self._printed: float | None = None
        self._live: Live | None = None
        if self.rich.is_terminal:
            self._live = Live(get_renderable=render, console=self.rich, refresh_per_second=1 / redraw)

    def say(self, sentence: str) -> None:
        """Prints a sentence above the line."""
        self.rich.print(Text(sentence), soft_wrap=not self.rich.is_terminal)

    def changed(self, *, last: bool = False) -> None:
        """The line has changed; `last` prints it whatever the time."""
        if self._live is not None:
            self._live.start()  # does nothing once it has started
            return
        now = self._clock()
        if self._printed is None or now - self._printed >= self._plain or last:
            self._printed = now
            self.rich.print(self._render(), soft_wrap=True)

    def close(self) -> None:
        """Leaves the last state of the line on the screen."""
        if self._live is not None:
            self._live.stop()


class Console:
    """The terminal of one run, or a log file where there is no terminal.

    steps: updates of the whole run, for the ETA. file, redraw, plain, clock: see `LiveLine`; `update` costs a step a
    few microseconds.
    """

    def __init__(
        self,
        *,
        steps: int,
        file: TextIO | None = None,
        redraw: float = 0.25,
        plain: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._steps, self._clock = steps, clock
        self._step = 0
        self._values: dict[str, float | None] = {}
        self._began: tuple[float, int] | None = None  # time and step of the first update, for the ETA
        self._lock = threading.Lock()
        self._live = LiveLine(self._line, file=file, redraw=redraw, plain=plain, clock=clock)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, start: Start) -> None:
        """Prints the table of the start."""
        self._live.rich.print(_start_table(start))

    def say(self, sentence: str) -> None:
        """Prints a sentence above the live line: a failure, a fallback, a sample."""
        self._live.say(sentence)

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows the state of the run after `step` updates.

        values: any of loss, bits_per_byte, tokens_per_second, mfu (0 to 1), input_wait (share of the step, 0 to 1);
        what is absent or None is not shown. Values stay until they are given again.
        """
        now = self._clock()
        with self._lock:
            self._step = step
            self._values.update(values)
            if self._began is None or step < self._began[1]:
                self._began = (now, step)
        self._live.changed(last=step == self._steps)

    def close(self) -> None:
        """Leaves the last state of the live line on the screen."""
        self._live.close()

    def _line(self) -> Text:
        with self._lock:
            step, values, began = self._step, dict(self._values), self._began
        if began is None:
            return Text("")
        parts = [f"step {step:,}/{self._steps:,}"]
        parts += [form(values[name]) for name, form in _FORMS.items() if values.get(name) is not None]
        done, left = step - began[1], self._steps - step
        if done > 0 and left > 0:
            parts.append(f"ETA {duration((self._clock() - began[0]) * left / done)}")
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


_FORMS: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "bits_per_byte": lambda x: f"{x:.3f} bits/byte",
    "tokens_per_second": lambda x: f"{quantity(x)} tokens/s",
    "mfu": lambda x: f"MFU {100 * x:.1f} %",
    "input_wait": lambda x: f"input wait {100 * x:.1f} %",
}


def quantity(x: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 1.23 M, 456 k."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= 0.9995 * scale:
            return f"{_three_digits(x / scale)} {prefix}{unit}"
    return f"{_three_digits(x)} {unit}".rstrip()


def _three_digits(x: float) -> str:
    if x == int(x) and abs(x) < 1000:
        return str(int(x))
    return f"{x:.2f}" if abs(x) < 9.995 else f"{x:.1f}" if abs(x) < 99.95 else f"{x:.0f}"


def cache_words(cache: CacheSize) -> str:
    """A decoding cache for people: 3.07 kB a token and 65.5 kB of state a row."""
    if cache.refusal is not None:
        return f"none: {cache.refusal}"
    state = f" and {quantity(cache.state, 'B')} of state" if cache.state else ""
    return f"{quantity(cache.a_token, 'B')} a token{state} a row, while decoding"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def _start_table(start: Start) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    active = "" if start.active == start.parameters else f", {quantity(start.active)} active for a token"
    row("parameters", f"{quantity(start.parameters)}{active}")
    row("FLOPs", f"{quantity(start.flops_per_token, 'FLOPs')} a token of training ({CONVENTION})")
    axes = " x ".join(f"{axis} {size}" for axis, size in start.mesh.items() if size > 1) or "one device"
    peak = peak_flops(start.device_kind)
    known = "peak not known: no MFU" if peak is None else f"peak {quantity(peak, 'FLOP/s')} each"
    there = start.devices + start.idle
    idle = f"; {start.idle} of {there} devices idle: `--overlay mesh/fsdp` uses all" if start.idle else ""
    row("mesh", f"{axes} on {start.devices} x {start.device_kind} ({known}){idle}")
    row("batch", f"{quantity(start.batch_tokens)} tokens a step")
    row("memory", "not predicted" if start.memory is None else f"{quantity(start.memory, 'B')} a device, predicted")
    row("cache", cache_words(start.cache))
    for index, (operation, implementation, reason) in enumerate(start.kernels):
        row("" if index else "kernels", f"{operation}: {implementation} ({reason})")
    for index, (name, tokens, share) in enumerate(start.sources):
        part = "" if share is None else f", {100 * share:.3g} % of the mixture"
        row("" if index else "data", f"{name}: {quantity(tokens)} tokens{part}")
    return table
