"""The manifest of a directory: size and CRC-32 of every file, so that damage is noticed before use.

It guards against truncation and flipped bits, not against an adversary.
"""

import json
import os
import pathlib
import zlib

NAME = "manifest.json"
CHUNK = (
    4 << 20
)  # bytes read at a time; zlib releases the interpreter lock, so hashing does not hold up the training loop


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file whole or not at all: a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(directory: pathlib.Path, facts: dict) -> None:
    """Writes the manifest of everything now in `directory`, with `facts` (JSON) to be read without the payload."""
    files = {name: [path.stat().st_size, _checksum(path)] for name, path in _files(directory)}
    body = {"files": files, "facts": facts}
    write_text(directory / NAME, json.dumps(body | {"crc32": _checksum_of(body)}, sort_keys=True))


def facts(directory: pathlib.Path) -> dict:
    """The facts given to `write`. Raises ValueError with one sentence where the manifest is missing or damaged."""
    return _read(directory)["facts"]


def damage(directory: pathlib.Path) -> str | None:
    """What is wrong with the directory in a few words, or None where every file is as it was written."""
    try:
        files = _read(directory)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, checksum) in files.items():
        path = directory / name
        try:
            actual = path.stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes of {size}"
            if _checksum(path) != checksum:
                return f"{name} has changed since it was written (CRC-32 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _read(directory: pathlib.Path) -> dict:
    try:
        body = json.loads((directory / NAME).read_bytes())
        checksum = body.pop("crc32")
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{NAME} cannot be read") from None
    if checksum != _checksum_of(body):
        raise ValueError(f"{NAME} has changed since it was written")
    return body


def _files(directory: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    files = [path for path in directory.rglob("*") if path.is_file() and path != directory / NAME]
    return sorted((path.relative_to(directory).as_posix(), path) for path in files)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _checksum_of(body: dict) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
