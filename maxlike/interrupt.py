"""A request to stop soon and cleanly: SIGTERM from a scheduler, Ctrl-C from a person.

While a training loop listens, the signal becomes a request: the loop looks at `requested()` after every step, saves a
checkpoint and returns. A second Ctrl-C stops at once. Elsewhere signals do what they always do.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_event = threading.Event()
_listeners = 0  # that are open, one inside the other


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM and the first SIGINT are requests here. Python delivers signals to the main thread alone, so in another
    thread nothing changes. Inside another `listening`, of many runs say, a request is for the outer one too."""
    global _listeners
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _listeners:
        clear()  # of an earlier training in this process
    _listeners += 1
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, lambda number, frame: request())
    signal.signal(signal.SIGINT, _first_interrupt)
    try:
        yield
    finally:
        _listeners -= 1
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_interrupt(number, frame) -> None:
    if _event.is_set():
        raise KeyboardInterrupt
    request()


def request() -> None:
    _event.set()


def requested() -> bool:
    return _event.is_set()


def clear() -> None:
    """Forgets a request, so that the same process can train again."""
    _event.clear()
