"""Optional libraries, imported where they are used, and the compressed files that one of them reads."""

import gzip
import importlib
import io
import pathlib

from maxlike.errors import UserError


def needs(module: str, package: str, knob: str):
    """Import an optional dependency, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{knob} needs {package} ({error}); install it with: pip install 'maxlike[data]'") from error


def open_compressed(path: pathlib.Path) -> io.BufferedIOBase:
    """A binary stream of a plain, .gz or .zst file. A compressed file that was cut short raises EOFError."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path, needs("zstandard", "zstandard", f"Reading {path.name}")), 1 << 17)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of all frames of a file. The library's own reader takes a truncated file for a short one."""

    def __init__(self, path: pathlib.Path, zstandard):
        self.file, self.zstandard = open(path, "rb"), zstandard  # noqa: SIM115 (close() closes it)
        self.frame, self.unread, self.compressed = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.unread:
            self.compressed = self.compressed or self.file.read(1 << 17)
            if not self.compressed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the last zstandard frame is cut short")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.unread = self.frame.decompress(self.compressed)
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self.compressed = self.frame.unused_data
        taken = min(len(buffer), len(self.unread))
        buffer[:taken], self.unread = self.unread[:taken], self.unread[taken:]
        return taken

    def close(self) -> None:
        self.file.close()
        super().close()
