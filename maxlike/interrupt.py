"""A request to stop soon and cleanly: SIGTERM from a scheduler, Ctrl-C from a person.

The training loop looks at `requested()` between steps, saves a checkpoint and returns. A second Ctrl-C stops at once.
"""

import signal
import threading

_event = threading.Event()


def install() -> None:
    """From the main thread: SIGTERM and the first SIGINT become a request."""
    signal.signal(signal.SIGTERM, lambda number, frame: _event.set())
    signal.signal(signal.SIGINT, _first_interrupt)


def _first_interrupt(number, frame) -> None:
    if _event.is_set():
        raise KeyboardInterrupt
    _event.set()


def request() -> None:
    _event.set()


def requested() -> bool:
    return _event.is_set()


def clear() -> None:
    """Forgets a request, so that a notebook can train again."""
    _event.clear()
