"""Files as the data layers see them: where a path points, what it holds, and where built layers are kept."""

import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import time

from maxlike.errors import UserError

PACKAGE_SCHEME = "package:"
_HASH_EVERY_TIME = 16 << 20  # bytes; larger files are hashed once and then recognised by size and modification time
_RACY_SECONDS = 2.0  # a file changed this recently may change again within the resolution of its modification time


def cache_directory(cache: str | None) -> pathlib.Path:
    """Where built layers live: `cache`, else $MAXLIKE_CACHE, else ~/.cache/maxlike/data."""
    chosen = cache or os.environ.get("MAXLIKE_CACHE") or "~/.cache/maxlike/data"
    return pathlib.Path(chosen).expanduser().resolve()


def resolve(path: str, knob: str) -> pathlib.Path:
    """One path. `package:experiments/data/x.txt` is a file shipped with an installed package; any other path is
    taken as it is, relative to the working directory. Refuses a package path that leaves its package."""
    if not path.startswith(PACKAGE_SCHEME):
        return pathlib.Path(path).expanduser()
    package, _, inside = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{knob}={path!r}: there is no installed package {package!r}; write package:<package>/<path>")
    if ".." in pathlib.PurePosixPath(inside).parts:
        raise UserError(f"{knob}={path!r} leaves the package {package!r}; name a file inside it, without '..'")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / inside


def expand(paths: str | tuple[str, ...], knob: str) -> list[pathlib.Path]:
    """The files that paths and glob patterns name, each pattern's in sorted order. Refuses a pattern that matches
    nothing, an empty or unreadable file, and the same file twice, by name."""
    found = []
    for path in (paths,) if isinstance(paths, str) else tuple(paths):
        where = resolve(path, knob)
        matches = [pathlib.Path(name) for name in sorted(glob.glob(str(where), recursive=True))]
        matches = [match for match in matches if match.is_file()]
        if not matches and where.is_file():  # a name that itself holds glob characters
            matches = [where]
        if not matches:
            raise UserError(f"{knob}: there is no file {path!r} (looked for {where.absolute()}); mend the path")
        found += matches
    if not found:
        raise UserError(f"{knob} names no file; give a path, a pattern or a tuple of them")
    for number, file in enumerate(found):
        if file.stat().st_size == 0:
            raise UserError(f"{knob}: {file} is empty; remove it from the source or write it again")
        if not os.access(file, os.R_OK):
            raise UserError(f"{knob}: {file} cannot be read; change its permissions")
        if file in found[:number]:
            raise UserError(f"{knob} names {file} twice; each file may occur once")
    return found


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: pathlib.Path, cache: pathlib.Path) -> str:
    """SHA-256 of a file that may be large: kept under `cache` and recognised by path, size and modification time."""
    status = path.stat()
    if status.st_size <= _HASH_EVERY_TIME:
        return sha256(path)
    known = cache / "digests" / digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    if known.is_file():
        return known.read_text()
    value = sha256(path)
    if time.time() - status.st_mtime > _RACY_SECONDS:
        known.parent.mkdir(parents=True, exist_ok=True)
        replace(known, value.encode())
    return value


def digest(*parts) -> str:
    """32 hexadecimal digits of the SHA-256 of plain values (anything JSON can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def temporary(path: pathlib.Path) -> pathlib.Path:
    """The name under which this process writes `path` before it renames it."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def replace(path: pathlib.Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the whole new one."""
    with open(temporary(path), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary(path), path)
