"""A store: a directory of ArrayRecord shards and the manifest that completes it.

Shards are written under a temporary name and renamed, each with a small JSON file that says what it holds; the
manifest is written last. So a store is either whole or it is being built, a build that was killed goes on with the
shards it has, and two processes that build the same store do no harm (the second waits, and finds it done).
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from array_record.python import array_record_module

from maxlike.data import files
from maxlike.errors import UserError

MANIFEST = "manifest.json"
# One record a chunk, so that a random read touches one record; tokens hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def shard_name(number: int, count: int) -> str:
    return f"{number:05d}-of-{count:05d}.array_record"


def write_shard(
    path: pathlib.Path, records: Iterable[bytes], *, index: pathlib.Path | None = None, **sums: int
) -> dict:
    """Write one shard atomically; what is known of it is kept beside it: its files with their sizes and SHA-256, the
    number of records, and the sums given. `index` is a file already written that belongs to the shard."""
    writer, count = array_record_module.ArrayRecordWriter(str(files.temporary(path)), _WRITER_OPTIONS), 0
    try:
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    except RuntimeError as error:
        raise OSError(errno.EIO, f"cannot write {path} ({error})") from error
    os.replace(files.temporary(path), path)
    sealed = {file.name: [file.stat().st_size, files.sha256(file)] for file in (path, index) if file is not None}
    facts = sums | {"file": path.name, "records": count, "sealed": sealed}
    files.replace(path.with_suffix(".json"), json.dumps(facts).encode())
    return facts


def finished_shard(path: pathlib.Path) -> dict | None:
    """The facts of a shard that an earlier build finished and nothing has damaged since, or None."""
    facts = path.with_suffix(".json")
    if not facts.is_file():
        return None
    known = json.loads(facts.read_text())
    return None if any(damage(path.with_name(name), *seal) for name, seal in known["sealed"].items()) else known


def damage(path: pathlib.Path, size: int, sha256: str | None) -> str | None:
    """What is wrong with a file: missing, another size, another checksum (where one is given); None if nothing."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"is {path.stat().st_size} bytes long instead of {size}"
    return "is damaged (its checksum differs)" if sha256 and files.sha256(path) != sha256 else None


def read_manifest(directory: pathlib.Path) -> dict | None:
    """The manifest of a finished store, or None. Refuses a shard that is missing or has another size."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {directory} and it is built again") from error
    _refuse_damage(directory, manifest, checksums=False)
    return manifest


def _refuse_damage(directory: pathlib.Path, manifest: dict, *, checksums: bool) -> None:
    for shard in manifest["shards"]:
        for name, (size, sha256) in shard["sealed"].items():
            if found := damage(directory / name, size, sha256 if checksums else None):
                raise UserError(f"{directory / name} {found}; remove {directory} and it is built again")


def write_manifest(directory: pathlib.Path, manifest: dict) -> None:
    files.replace(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    for leftover in directory.glob("*.tmp"):
        leftover.unlink(missing_ok=True)


def verify(directory: pathlib.Path) -> int:
    """Read every byte of a finished store against its checksums; the number of shards. Refuses the first that
    differs, and a directory without a store."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} holds no finished store; build it first")
    _refuse_damage(directory, manifest, checksums=True)
    return len(manifest["shards"])


@contextlib.contextmanager
def building(directory: pathlib.Path) -> Iterator[None]:
    """Only one process at a time is inside for one directory; the system lets go of the lock of one that dies. Hosts
    that share `directory` over a network need a file system whose flock spans hosts (NFS 4, Lustre with -o flock)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"The data layers cannot be written under {directory} ({error}); free space there, or set Data.cache "
                "or MAXLIKE_CACHE to a directory that can be written"
            ) from error
        raise


def discard(directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def run_jobs(function: Callable[[tuple], dict], jobs: list[tuple], workers: int, label: str) -> list[dict]:
    """`function` of every job, in order: here, or in `workers` processes. Says what it does when that takes a while."""
    if workers == 0 or len(jobs) == 1:
        return [function(job) for job in jobs]
    print(f"{label}: {len(jobs)} jobs in {workers} processes", file=sys.stderr)
    spawn = multiprocessing.get_context("spawn")  # a fork would copy jax's threads in the middle of their work
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), mp_context=spawn) as pool:
        return list(pool.map(function, jobs))


class Records:
    """The records of a store by number, whatever shard they are in. Opens shards at first use, in each process."""

    def __init__(self, directory: pathlib.Path, shards: list[dict]):
        self.directory = directory
        self._files = [shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["records"] for shard in shards])
        self._open()

    def _open(self) -> None:
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _reader(self, shard: int):
        with self._lock:
            if shard not in self._readers:
                path = self.directory / self._files[shard]
                # Reads are random: neither read ahead nor fill large buffers.
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 12
                )
            return self._readers[shard]

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, record in the shard) of one record."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(number - (self._ends[shard - 1] if shard else 0))

    def read(self, numbers: np.ndarray) -> list[bytes]:
        """The records of the given numbers, in the order asked. Refuses a damaged shard by name."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        inside = numbers - np.where(shards > 0, self._ends[shards - 1], 0)
        records: list[bytes] = [b""] * len(numbers)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            try:
                found = self._reader(int(shard)).read(inside[places].tolist())
            except RuntimeError as error:
                raise UserError(
                    f"{self.directory / self._files[shard]} is damaged ({error}); remove {self.directory} and it is "
                    "built again"
                ) from error
            for place, record in zip(places, found):
                records[place] = record
        return records

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()
