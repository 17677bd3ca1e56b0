"""Sources whose documents are records that can be read in any order: ArrayRecord files and TFDS datasets."""

import collections
import json
import pathlib
from collections.abc import Iterator
from typing import Literal

from array_record.python import array_record_module

from maxlike.data import files
from maxlike.data.optional import needs
from maxlike.data.sources import FileSource, Source, member
from maxlike.errors import UserError

_RECORDS_A_PART = 10_000


class ArrayRecord(FileSource):
    """ArrayRecord files, a document a record.

    paths, on_malformed: see FileSource; a record that is not UTF-8 (or not JSON with that field) is malformed.
    field: the member of each record's JSON object that holds the text; None where a record is the text itself.
    """

    def __init__(
        self, *, paths: str | tuple[str, ...], field: str | None = None, on_malformed: Literal["stop", "skip"] = "stop"
    ):
        super().__init__(paths, on_malformed)
        self.field = field

    def knobs(self) -> dict:
        return super().knobs() | {"field": self.field}

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        path = self.files()[part]
        reader = array_record_module.ArrayRecordReader(str(path))
        if not reader.ok():
            raise UserError(f"{path} is not a whole ArrayRecord file; write it again")
        total = reader.num_records()
        for start in range(0, total, 256):
            stop = min(start + 256, total)
            try:
                records = reader.read(start, stop)
            except RuntimeError as error:
                raise UserError(f"{path}: records {start} to {stop} are damaged ({error}); write it again") from error
            for index, record in enumerate(records, start):
                text = self._text(record, f"{path}: record {index}", skipped)
                if text:
                    yield index, text
        reader.close()

    def _text(self, record: bytes, where: str, skipped: collections.Counter) -> str | None:
        try:
            text = record.decode() if self.field is None else member(json.loads(record), self.field)
        except UnicodeDecodeError as error:
            return self.malformed(f"{where}: byte {error.start} is not valid UTF-8", skipped, "UTF-8")
        except ValueError as error:
            return self.malformed(f"{where} is not one JSON object ({error})", skipped, "invalid JSON")
        if not isinstance(text, str):
            return self.malformed(f"{where} has no text under {self.field!r}", skipped, "no text")
        if not text:
            skipped["empty"] += 1
        return text


class Tfds(Source):
    """A TensorFlow dataset, read through `tfds.data_source` (no TensorFlow at run time; ArrayRecord files).

    name: 'name', 'name/config' or 'name/config:version'.
    split: any TFDS split, slices included ('train[:10%]').
    field: the feature that holds the text.
    data_dir: where prepared datasets lie; None is TFDS's own default.
    download: prepare the dataset when it is not there yet; False refuses instead.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str = "train",
        field: str = "text",
        data_dir: str | None = None,
        download: bool = False,
    ):
        if not name or not split:
            raise UserError(f"Tfds.name={name!r} and Tfds.split={split!r} must both be given")
        self.name, self.split, self.field = name, split, field
        self.data_dir, self.download = data_dir, download

    def _builder(self):
        tfds = needs("tensorflow_datasets", "tensorflow-datasets and importlib_resources", "Tfds")
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise UserError(f"Tfds.name={self.name!r} cannot be opened ({error}); mend the name or data_dir") from error
        if not builder.is_prepared():
            if not self.download:
                raise UserError(
                    f"Tfds: {builder.info.full_name} is not prepared under {builder.data_path}; set "
                    "Tfds.download=True, or prepare it with: tfds build NAME --file_format=array_record"
                )
            builder.download_and_prepare()
        return builder

    def _data_source(self):
        """The split, decoded no further than its text."""
        builder = self._builder()
        try:
            return builder.as_data_source(split=self.split)
        except (ValueError, KeyError) as error:
            splits = ", ".join(builder.info.splits)
            raise UserError(f"Tfds.split={self.split!r} of {self.name} is unknown; it has {splits}") from error

    def parts(self) -> list[tuple[str, int]]:
        builder, count = self._builder(), len(self._data_source())
        if count == 0:
            raise UserError(f"Tfds: {self.name} split {self.split!r} holds no documents; choose another split")
        total = builder.info.dataset_size // max(1, sum(split.num_examples for split in builder.info.splits.values()))
        starts = range(0, count, _RECORDS_A_PART)
        return [(f"{self.name}[{start}]", total * min(_RECORDS_A_PART, count - start)) for start in starts]

    def read(self, part: int, skipped: collections.Counter) -> Iterator[tuple[int, str]]:
        source = self._data_source()
        start = part * _RECORDS_A_PART
        for index in range(start, min(start + _RECORDS_A_PART, len(source))):
            text = member(source[index], self.field)
            if not isinstance(text, (bytes, str)):
                names = ", ".join(source[index])
                raise UserError(f"Tfds.field={self.field!r} is no text of {self.name}; its features are {names}")
            try:
                text = text.decode() if isinstance(text, bytes) else text
            except UnicodeDecodeError as error:
                raise UserError(f"Tfds: {self.name} record {index} is not valid UTF-8; choose data that is") from error
            if text:
                yield index, text
            else:
                skipped["empty"] += 1

    def fingerprint(self, cache: pathlib.Path) -> str:
        builder = self._builder()
        sizes = {name: [split.num_examples, split.num_bytes] for name, split in builder.info.splits.items()}
        return files.digest("Tfds", builder.info.full_name, sizes, self.split, self.field)
