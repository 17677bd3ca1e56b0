"""TensorBoard events, written in the calling thread: one record a step, no queue, no thread that can die unseen."""

import pathlib
import socket
import sys
import time
from collections.abc import Callable

FLUSH_SECONDS = 20.0


class Events:
    """The event file of one run. An event file is opened with the first scalars.

    directory: made if needed. say: told once, in a sentence, when the disk takes no more; the run goes on.
    """

    def __init__(self, directory: pathlib.Path, say: Callable[[str], None]):
        self._directory, self._say = directory, say
        self._file = None
        self._purge_from: int | None = None
        self._flushed = 0.0
        self._failed = False

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """All scalars of a step as one event."""
        try:
            if self._file is None:
                self._open()
            summary = self._summary(value=[self._summary.Value(tag=n, simple_value=x) for n, x in scalars.items()])
            self._file.write(self._event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            if not self._failed:
                self._say(f"TensorBoard events cannot be written ({error}): metrics.jsonl goes on; free some space")
            self._failed = True

    def forget_after(self, step: int) -> None:
        """What was written after `step` does not count: TensorBoard is told so by the next file."""
        self.close()
        self._file, self._purge_from = None, step + 1

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._say(f"the last TensorBoard events could not be written ({error})")

    def _open(self) -> None:
        # Imported with PyTorch out of its sight: where that is installed tensorboardX imports it, which takes seconds
        # and hundreds of megabytes, to draw torch graphs.
        hidden = "torch" not in sys.modules
        if hidden:
            sys.modules["torch"] = None
        try:
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
            from tensorboardX.record_writer import RecordWriter
        finally:
            if hidden:
                del sys.modules["torch"]
        self._event, self._summary = Event, Summary
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = RecordWriter(str(self._directory / name))
        opening = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            opening.append(Event(wall_time=time.time(), step=self._purge_from, session_log=start))
        for event in opening:
            self._file.write(event.SerializeToString())
