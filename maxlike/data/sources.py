"""Sources of documents: text, JSON lines, Parquet, ArrayRecord and TFDS.

A source is cut into parts (a file, or a range of records) that are read independently, and yields `(index, text)`
for every document of a part; `index` is the line or the record number. A document is named `<part>:<index>`.
Nothing is opened before it is read, so an experiment can be built where its data is not.
"""

import collections
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Literal

from maxlike.data import files
from maxlike.data.optional import needs, open_compressed
from maxlike.errors import UserError

_FIRST_BYTE_OF_CHARACTER = re.compile(rb"[\x00-\x7f\xc0-\xff]")
_SURROGATE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


class Source:
    """What the token layer asks of a source. Subclasses give `parts`, `read` and `identity`."""

    def parts(self) -> list[tuple[str, int]]:
        """(name, size in bytes as stored) of each part, in an order that depends on the content alone."""
        raise UserError(f"{type(self).__name__} is not a source of documents; bind Text, Jsonl, Parquet, ... instead")

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        """The documents of one part; what is left out is counted in `skipped` by reason."""
        raise UserError(f"{type(self).__name__} is not a source of documents; bind Text, Jsonl, Parquet, ... instead")

    def fingerprint(self, cache: pathlib.Path) -> str:
        """Identifies the documents: the content of the files and the knobs that select from them, not the paths."""
        raise UserError(f"{type(self).__name__} is not a source of documents; bind Text, Jsonl, Parquet, ... instead")


class FileSource(Source):
    """A source whose parts are files.

    paths: a path, a glob pattern (`**` included), or a tuple of them, relative to the working directory;
        `package:experiments/data/austen/*.txt` names files shipped with a package.
    on_malformed: 'stop' refuses the first malformed document by file and place, 'skip' leaves it out and counts it.
    """

    def __init__(self, paths: str | tuple[str, ...], on_malformed: str):
        if not isinstance(paths, str) and not (isinstance(paths, (tuple, list)) and paths):
            raise UserError(f"{type(self).__name__}.paths={paths!r} is neither a path nor a tuple of paths; give one")
        if on_malformed not in ("stop", "skip"):
            raise UserError(f"{type(self).__name__}.on_malformed={on_malformed!r} must be 'stop' or 'skip'")
        self.paths = paths if isinstance(paths, str) else tuple(paths)
        self.on_malformed = on_malformed

    def files(self) -> list[pathlib.Path]:
        return files.expand(self.paths, f"{type(self).__name__}.paths")

    def parts(self) -> list[tuple[str, int]]:
        return [(file.name, file.stat().st_size) for file in self.files()]

    def knobs(self) -> dict:
        """The knobs, other than paths, on which the documents depend."""
        return {"on_malformed": self.on_malformed}

    def fingerprint(self, cache: pathlib.Path) -> str:
        content = [[file.name, files.content_digest(file, cache)] for file in self.files()]
        return files.digest(type(self).__name__, self.knobs(), content)

    def malformed(self, what: str, skipped: collections.Counter, reason: str) -> None:
        """Stop or count, as the policy says."""
        if self.on_malformed == "stop":
            raise UserError(f"{what}; mend it, or set {type(self).__name__}.on_malformed='skip' to leave it out")
        skipped[reason] += 1


class Text(FileSource):
    """Plain UTF-8 text; each file is read whole.

    paths, on_malformed: see FileSource.
    separator: regular expression between the documents of a file (dropped), such as r"\\n\\s*\\n" for blank lines;
        None makes each file one document. Empty documents do not count.
    start_byte, end_byte: the range that is read, in bytes of all the files laid end to end; a negative number counts
        from the end, None is the end. A cut inside a character moves back to that character's first byte, so
        `end_byte=-n` and `start_byte=-n` split a corpus without loss or overlap.
    Refuses an empty range, invalid UTF-8 (with file and byte), and a separator that is not a regular expression.
    """

    def __init__(
        self,
        *,
        paths: str | tuple[str, ...],
        separator: str | None = None,
        start_byte: int = 0,
        end_byte: int | None = None,
        on_malformed: Literal["stop", "skip"] = "stop",
    ):
        super().__init__(paths, on_malformed)
        try:
            re.compile(separator or "")
        except re.error as error:
            raise UserError(f"Text.separator={separator!r} is not a regular expression ({error}); mend it") from error
        self.separator, self.start_byte, self.end_byte = separator, start_byte, end_byte

    def knobs(self) -> dict:
        return super().knobs() | {"separator": self.separator, "start_byte": self.start_byte, "end_byte": self.end_byte}

    def _ranges(self) -> list[tuple[pathlib.Path, int, int]]:
        """The byte range of each file that has one."""
        paths = self.files()
        ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        total = ends[-1]
        start = self.start_byte + (total if self.start_byte < 0 else 0)
        end = total if self.end_byte is None else self.end_byte + (total if self.end_byte < 0 else 0)
        if not 0 <= start < end <= total:
            raise UserError(
                f"Text.start_byte={self.start_byte} and Text.end_byte={self.end_byte} select no range of the "
                f"{total} bytes of {self.paths!r}; choose 0 <= start < end <= {total}"
            )
        ranges = []
        for path, begin, finish in zip(paths, [0, *ends], ends):
            low, high = max(start, begin) - begin, min(end, finish) - begin
            if low < high:
                ranges.append((path, low, high))
        return ranges

    def parts(self) -> list[tuple[str, int]]:
        return [(path.name, high - low) for path, low, high in self._ranges()]

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        path, low, high = self._ranges()[part]
        whole = path.read_bytes()
        low, high = character_start(whole, low), character_start(whole, high)
        content = whole[low:high]
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if self.on_malformed == "stop":
                self.malformed(f"{path}: byte {low + error.start} is not valid UTF-8", skipped, "invalid UTF-8")
            text = content.decode(errors="surrogateescape")
        pieces = re.split(self.separator, text) if self.separator else [text]
        pieces = [piece for piece in pieces if piece]  # None where a group of the separator did not take part
        for index, piece in enumerate(pieces):
            if _SURROGATE.search(piece):
                skipped["invalid UTF-8"] += 1
            else:
                yield index, piece


def character_start(content: bytes, offset: int) -> int:
    """The last offset <= `offset` at which a UTF-8 character starts (or the end of the content)."""
    for back in range(min(4, offset + 1)):
        if offset == len(content) or _FIRST_BYTE_OF_CHARACTER.match(content, offset - back):
            return offset - back
    return offset  # not UTF-8 here: the decoder will say so


class Jsonl(FileSource):
    """JSON lines, one object a line, plain or compressed (.gz, .zst).

    paths, on_malformed: see FileSource; a malformed line is named as file:line.
    field: the member that holds the text; dots reach into objects ('document.text').
    """

    def __init__(
        self, *, paths: str | tuple[str, ...], field: str = "text", on_malformed: Literal["stop", "skip"] = "stop"
    ):
        super().__init__(paths, on_malformed)
        self.field = field

    def knobs(self) -> dict:
        return super().knobs() | {"field": self.field}

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        path = self.files()[part]
        number = 0
        try:
            with open_compressed(path) as stream:
                for number, line in enumerate(stream, 1):
                    text = self._text(line, f"{path}:{number}", skipped)
                    if text:
                        yield number, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged after line {number} ({error}); fetch or compress it again") from error

    def _text(self, line: bytes, where: str, skipped: collections.Counter) -> str | None:
        if not line.strip():
            return None
        try:
            text = member(json.loads(line), self.field)
        except UnicodeDecodeError as error:
            return self.malformed(f"{where}: byte {error.start} of the line is not valid UTF-8", skipped, "UTF-8")
        except (ValueError, RecursionError) as error:
            return self.malformed(f"{where} is not one JSON object ({error})", skipped, "invalid JSON")
        if not isinstance(text, str):
            return self.malformed(f"{where} has no text under {self.field!r}", skipped, "no text")
        if _has_lone_surrogate(text):
            return self.malformed(f"{where} holds a lone surrogate, which UTF-8 cannot hold", skipped, "UTF-8")
        if not text:
            skipped["empty"] += 1
        return text


def member(value, field: str):
    """The member a dotted name reaches, or None."""
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class Parquet(FileSource):
    """Parquet files, a document a row.

    paths, on_malformed: see FileSource; a row whose text is missing (null) is malformed.
    field: the column of strings that holds the text.
    Refuses a file without that column, naming those it has.
    """

    def __init__(
        self, *, paths: str | tuple[str, ...], field: str = "text", on_malformed: Literal["stop", "skip"] = "stop"
    ):
        super().__init__(paths, on_malformed)
        self.field = field

    def knobs(self) -> dict:
        return super().knobs() | {"field": self.field}

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        parquet = needs("pyarrow.parquet", "pyarrow", "Parquet")
        arrow = needs("pyarrow", "pyarrow", "Parquet")
        path = self.files()[part]
        try:
            with parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                if self.field not in columns:
                    raise UserError(f"{path} has no column Parquet.field={self.field!r}; it has {', '.join(columns)}")
                rows = itertools.count()
                for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                    for row, text in zip(rows, batch.column(0).to_pylist()):
                        if not isinstance(text, str):
                            self.malformed(f"{path}: row {row} has no text in {self.field!r}", skipped, "no text")
                        elif text:
                            yield row, text
                        else:
                            skipped["empty"] += 1
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as Parquet ({error}); write it again") from error
