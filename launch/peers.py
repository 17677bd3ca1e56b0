"""The processes of one job, each knowing that the others live: one TCP connection from every process to process 0.

jax has heartbeats of its own, but it notices a killed process after 100 s, aborts the others from C++ and names nobody.
Here a killed process is noticed as its connection closes, a host that fell silent after `SILENCE` seconds, and every
other process stops with one sentence that names the missing one. What is exchanged is one JSON object a line.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

from maxlike.errors import TRY_AGAIN, UserError

BEAT = 2.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one after which a process counts as gone: below jax's 100 s, so that ours speaks first
GRACE = 2.0  # seconds that a process has to report an error of its own before another's is taken for the cause
LONGEST = 1 << 16  # bytes of a message; whoever sends more is not one of us


@dataclasses.dataclass(frozen=True)
class Peer:
    """Who a process is. process: its index in the job."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process} (pid {self.pid} on {self.host})"


def myself(process: int) -> Peer:
    return Peer(process, socket.gethostname(), os.getpid())


class Line:
    """One connection: sends and receives JSON objects, a line each. `peer` is set once the other side said who it is,
    `left` when it said goodbye, `heard` is the time of its last sign of life."""

    def __init__(self, connection: socket.socket, peer: Peer | None = None):
        connection.settimeout(None)
        self.connection, self.peer = connection, peer
        self.heard, self.left = time.monotonic(), False
        self._buffer, self._lock = b"", threading.Lock()

    def send(self, **message: object) -> None:
        """Sends, or leaves it to the reader of this connection to notice that it is closed."""
        with contextlib.suppress(OSError), self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have arrived, waiting for some bytes; None where the connection is closed. Raises
        ValueError for what is no message."""
        try:
            arrived = self.connection.recv(1 << 12)
        except OSError:
            return None
        if not arrived:
            return None
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + arrived).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if len(self._buffer) > LONGEST or not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message of this protocol")
        return messages


def listen(port: int) -> socket.socket:
    """Listens on all interfaces. Raises UserError where the port is taken; port 0 finds a free one."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}): name another one with --coordinator"
        ) from None


def gather(listener: socket.socket, processes: int, timeout: float, say: Callable[[str], None]) -> dict[int, Line]:
    """In process 0: {process: line} of those who came within `timeout` seconds, all of them if it can be.

    Who says it is of another job, or a process that is here already, is refused and told so; `say` gets it too.
    """
    here: dict[int, Line] = {}
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(here) < processes - 1 and time.monotonic() < deadline:
            for key, _ in selector.select(min(1.0, max(deadline - time.monotonic(), 0.0))):
                if key.fileobj is listener:
                    line = Line(listener.accept()[0])
                    selector.register(line.connection, selectors.EVENT_READ, line)
                    continue
                refusal = _hello(key.data, here, processes)
                if refusal is not None:
                    selector.unregister(key.fileobj)
                    key.data.send(refused=refusal)
                    key.data.connection.close()
                    say(refusal)
                    here = {process: line for process, line in here.items() if line is not key.data}
        return here


def _hello(line: Line, here: dict[int, Line], processes: int) -> str | None:
    """Takes the first message of a connection; the reason to refuse it, or None."""
    try:
        messages = line.receive()
        if messages is None:
            return f"{line.peer or 'somebody who did not say who'} hung up while the processes were meeting"
        if not messages:  # half a line so far
            return None
        said = messages[0]
        peer, count = Peer(int(said["process"]), str(said["host"]), int(said["pid"])), int(said["processes"])
    except (ValueError, KeyError, TypeError):
        return "refused a connection that does not come from a process of this job"
    if count != processes:
        return f"{peer} was started with --processes {count} and process 0 with {processes}: give both the same"
    if peer.process in here:
        return f"{peer} has the index of {here[peer.process].peer}: give each its own --process"
    line.peer = peer
    here[peer.process] = line
    return None


def reach(host: str, port: int, process: int, processes: int, timeout: float) -> Line:
    """In the others: a line to process 0, which is told who this is. Tries for `timeout` seconds, then UserError."""
    began = time.monotonic()
    while True:
        try:
            left = began + timeout - time.monotonic()
            line = Line(socket.create_connection((host, port), timeout=max(min(left, 5.0), 0.1)))
            break
        except OSError as error:
            if time.monotonic() - began >= timeout:
                raise UserError(
                    f"the coordinator {host}:{port} could not be reached in {timeout:g} s ({error.strerror or error}): "
                    "start process 0 there with the same --coordinator, and let this host through to that port"
                ) from None
            time.sleep(0.1)
    me = myself(process)
    line.send(process=me.process, processes=processes, host=me.host, pid=me.pid)
    return line


def answer(line: Line, address: str, timeout: float) -> dict:
    """Process 0's answer to `reach`: where jax's own service is. Raises UserError where it refuses or is not one."""
    line.connection.settimeout(timeout)
    messages: list[dict] | None = []
    try:
        while messages == []:  # less than a line so far
            messages = line.receive()
    except ValueError:
        raise UserError(f"what answers at {address} is not process 0 of this job: correct --coordinator") from None
    line.connection.settimeout(None)
    if messages is None:
        raise UserError(
            f"process 0 at {address} gave no answer in {timeout:g} s or hung up: look at what it says itself"
        )
    if "refused" in messages[0]:
        raise UserError(str(messages[0]["refused"]))
    line.peer = Peer(0, str(messages[0]["host"]), int(messages[0]["pid"]))
    return messages[0]


def stop_at_once(sentence: str, code: int) -> None:
    """Says the sentence and ends the process without unwinding: the main thread may hang in a collective."""
    os.write(2, f"maxlike: {sentence}; stopping here too. The same command goes on from the last checkpoint\n".encode())
    os._exit(code)


class Peers:
    """Watches the lines {process: line}: in process 0 those to all others, elsewhere the one to process 0, which passes
    on what it learns.

    stop: called with a sentence and an exit code, from another thread, when a process is gone (code `TRY_AGAIN`) or
        stopped with an error (its own code); it should end this process.
    """

    def __init__(
        self, lines: dict[int, Line], *, processes: int, silence: float = SILENCE, stop: Callable = stop_at_once
    ):
        self._lines, self._processes, self._silence, self._stop = lines, processes, silence, stop
        self._over, self._leaving = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def leave(self, code: int, why: str = "") -> None:
        """Tells the others that this process ends with `code`. After an error it no longer cares for them; else it
        watches on, because jax's way out waits for all of them."""
        self._leaving = True
        if code:
            self._over.set()
        for line in self._lines.values():
            line.send(left=code, why=why)

    def _watch(self) -> None:
        looked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for line in self._lines.values():
                selector.register(line.connection, selectors.EVENT_READ, line)
                line.heard = looked
            beaten = 0.0
            while not self._over.is_set() and selector.get_map() and not self._all_leave():
                for key, _ in selector.select(min(BEAT, self._silence) / 4):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - looked > self._silence / 2:  # it was this process that slept: the others had no chance
                    for line in self._lines.values():
                        line.heard = now
                looked = now
                if now - beaten > min(BEAT, self._silence / 4):
                    beaten = now
                    for line in self._lines.values():
                        line.send(beat=1)
                for line in self._lines.values():
                    if not line.left and now - line.heard > self._silence:
                        self._lost(line, f"has not been heard of for {now - line.heard:.0f} s", TRY_AGAIN)

    def _all_leave(self) -> bool:
        return self._leaving and all(line.left for line in self._lines.values())

    def _hear(self, line: Line) -> bool:
        """Takes what arrived on a line; whether it is still open."""
        try:
            messages = line.receive()
        except ValueError:
            messages = None
        if messages is None:
            if not line.left:
                self._lost(line, "is gone: killed, crashed or cut off", TRY_AGAIN)
            return False
        for message in messages:
            if "stop" in message and not self._over.wait(float(message["grace"])):
                self._end(str(message["stop"]), int(message["code"]))
            if "left" in message:
                line.left = True
                if message["left"] != 0:
                    self._lost(line, f"stopped with exit code {message['left']}: {message['why']}", message["left"])
        return True

    def _lost(self, line: Line, how: str, code: int) -> None:
        """Passes the news on, and stops this process: at once where another vanished, after a grace where it ended
        with an error, which this process may be about to report itself."""
        line.left = True
        sentence = f"{line.peer} of {self._processes} {how}"
        grace = 0.0 if code == TRY_AGAIN else GRACE
        for other in self._lines.values():
            if other is not line:
                other.send(stop=sentence, code=code, grace=grace)
        if not self._over.wait(grace):
            self._end(sentence, code)

    def _end(self, sentence: str, code: int) -> None:
        self._over.set()
        self._stop(sentence, code)
