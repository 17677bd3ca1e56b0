"""A run directory: the known file names, one owner at a time, text files written whole."""

import errno
import fcntl
import json
import os
import pathlib
import socket
from typing import Literal

from maxlike.errors import UserError
from maxlike.manifest import write_text

_held: set[int] = set()  # descriptors of the locks this process holds


def _let_go_in_a_child() -> None:
    """A forked data worker must not keep the lock of its dead parent alive."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_a_child)


class RunDirectory:
    """The directory `runs/NAME` of one run.

    path: the directory; 'own' creates it with its parents.
    mode: 'own' for the process that trains: checks that it can write, and holds a lock (flock on `lock`) that vanishes
        with the process. 'share' likewise, for a process beside others that share the directory: together they keep
        out whoever would own it. 'join' for the further processes of the same job, which do not lock. 'read' for
        evaluation and generation, which may look at a run that is being trained.
    Raises UserError where the directory cannot be written, belongs to a living process, or (read) is not there.
    """

    def __init__(self, path: pathlib.Path | str, *, mode: Literal["own", "share", "join", "read"] = "own"):
        self.path = pathlib.Path(path).absolute()
        self.mode = mode
        self._lock: int | None = None
        if mode != "read":
            self._create()
        if mode in ("own", "share"):
            self._acquire()
        elif not self.path.is_dir():
            raise UserError(f"there is no run in {self.path}: train it first, or correct --run_dir")

    @property
    def config(self) -> pathlib.Path:
        """The operative gin configuration."""
        return self.path / "config.gin"

    @property
    def metrics(self) -> pathlib.Path:
        """One JSON object a line: step, split, loss, ..."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def events(self) -> pathlib.Path:
        """TensorBoard events."""
        return self.path / "events"

    @property
    def report(self) -> pathlib.Path:
        return self.path / "report.html"

    def file(self, name: str) -> pathlib.Path:
        """Any other file of the run, such as 'loss.png'. Refuses a name that leads out of the directory."""
        path = (self.path / name).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise UserError(f"{name!r} leads out of the run directory {self.path}: use a relative name inside it")
        return path

    def write_text(self, name: str, text: str) -> pathlib.Path:
        """Writes a text file whole or not at all; returns its path."""
        path = self.file(name)
        write_text(path, text)
        return path

    def close(self) -> None:
        """Lets go of the lock; the directory can then be owned again."""
        if self._lock is not None and self._lock in _held:
            _held.discard(self._lock)
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(
            f"the run directory {self.path} cannot be written ({error.strerror}): "
            "make it writable, or name another one with --run_dir"
        )

    def _acquire(self) -> None:
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if self.mode == "own" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"the run directory {self.path} is in use by {_name(holder)}: "
                    "wait for it to end, stop it, or name another one with --run_dir"
                ) from None
            raise UserError(
                f"the run directory {self.path} cannot be locked ({error.strerror}): "
                "free some space, or put it on a file system that knows flock with --run_dir"
            ) from error
        _held.add(descriptor)
        self._lock = descriptor


def _name(holder: bytes) -> str:
    try:
        record = json.loads(holder)
        return f"process {int(record['pid'])} on {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
