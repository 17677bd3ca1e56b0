"""The row layer: one record a packed row of L + 1 tokens (L inputs and the L targets one to the right).

A record is the tokens, then for each piece of a document in the row three int64: (document, offset of the piece in
the document, length). The pieces fill the row; padding is a last piece of document -1.

concat: documents laid end to end and cut every L tokens: row i is stream[i L : i L + L + 1], so neighbours share a
    token and every token of the stream is a target once. No padding but at the very end.
best_fit: whole documents, each put into the row whose free space it fills best (longest first; Ding et al. 2024,
    "Fewer Truncations Improve Language Modeling", arXiv 2404.10830). No document is cut unless it is longer than a
    row; then its chunks share a token, so that every token is still a target once.
"""

import bisect
import collections
import itertools
import pathlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from maxlike.data import files, store
from maxlike.data.token_store import TokenStore
from maxlike.errors import UserError

VERSION = 1
SHARD_TOKENS = 1 << 25  # of rows a shard
PADDING = -1  # the document of a piece that is padding
Packing = Literal["concat", "best_fit"]
Pieces = list[tuple[int, int, int]]  # (document, offset, length) of each piece of a row


class Rows:
    """A finished row layer of one source. `count` rows of `length` + 1 tokens; `padding` tokens of them are padding;
    `cut` documents lie in more than one row."""

    def __init__(self, directory: pathlib.Path, manifest: dict):
        self.directory, self.manifest = directory, manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.length: int = manifest["length"]
        self.padding, self.cut = manifest["padding"], manifest["cut"]
        self.dtype = np.dtype(manifest["dtype"])
        self.records = store.Records(directory, manifest["shards"])
        self.count = len(self.records)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows by number: tokens int32 [rows, L + 1], pieces int64 [pieces, 3] of all rows one after the other, and
        how many pieces each row has, int64 [rows]."""
        records = self.records.read(numbers)
        width = (self.length + 1) * self.dtype.itemsize
        tokens = np.frombuffer(b"".join([record[:width] for record in records]), self.dtype)
        pieces = np.frombuffer(b"".join([record[width:] for record in records]), "<i8").reshape(-1, 3)
        counts = np.array([(len(record) - width) // 24 for record in records], np.int64)
        return tokens.astype(np.int32).reshape(len(records), self.length + 1), pieces, counts


def build(name: str, tokens: TokenStore, *, length: int, packing: Packing, cache: pathlib.Path, workers: int) -> Rows:
    """The row layer of a token layer; `name` is the source's, for messages. Opens it when it is already there."""
    if length < 1:
        raise UserError(f"sequence_length={length} must be at least 1")
    identity = files.digest("rows", VERSION, tokens.fingerprint, length, packing)
    directory = cache / "rows" / f"L{length}-{packing}-{identity}"
    manifest = store.read_manifest(directory)
    if manifest is None:
        with store.building(directory):
            manifest = store.read_manifest(directory)
            if manifest is None:
                manifest = _build(name, tokens, directory, identity, length, packing, workers)
    return Rows(directory, manifest)


def _build(
    name: str, tokens: TokenStore, directory: pathlib.Path, identity: str, length: int, packing: Packing, workers: int
) -> dict:
    ends = np.cumsum(tokens.lengths())
    jobs = (concat_jobs if packing == "concat" else best_fit_jobs)(ends, length)
    function = pack_concat if packing == "concat" else pack_best_fit
    calls = [(tokens, length, job, directory / store.shard_name(number, len(jobs))) for number, job in enumerate(jobs)]
    shards = store.run_jobs(function, calls, workers, f"Packing the rows of {name!r}")
    manifest = {
        "kind": "rows", "version": VERSION, "fingerprint": identity, "parent": tokens.fingerprint, "length": length,
        "packing": packing, "dtype": tokens.dtype.str, "shards": shards,
        "rows": sum(shard["records"] for shard in shards), "padding": sum(shard["padding"] for shard in shards),
        "cut": cut_documents(ends, length, packing),
    }  # fmt: skip
    store.write_manifest(directory, manifest)
    return manifest


def cut_documents(ends: np.ndarray, length: int, packing: Packing) -> int:
    """Documents that lie in more than one row."""
    starts = np.concatenate([[0], ends[:-1]])
    if packing == "best_fit":
        return int((ends - starts > length + 1).sum())
    return int((starts // length != (ends - 2) // length).sum())  # of the first and the last input of each document


def concat_jobs(ends: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Ranges of rows, a shard each. n tokens hold n - 1 targets, L a row, the last row padded."""
    rows = -(-(int(ends[-1]) - 1) // length)
    step = max(1, SHARD_TOKENS // length)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack_concat(call: tuple[TokenStore, int, tuple[int, int], pathlib.Path]) -> dict:
    """Write rows [first, last) of the stream."""
    tokens, length, (first, last), path = call
    known = store.finished_shard(path)
    if known is not None:
        return known
    ends = np.cumsum(tokens.lengths())
    starts = np.concatenate([[0], ends[:-1]])
    low, high = first * length, min(last * length + 1, int(ends[-1]))
    first_document = int(np.searchsorted(ends, low, side="right"))
    last_document = int(np.searchsorted(starts, high, side="left"))
    stream = np.concatenate(tokens.read(np.arange(first_document, last_document)))
    stream = stream[low - starts[first_document] :]

    def pieces(start: int, end: int) -> Pieces:
        documents = range(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left")))
        begins = [max(start, int(starts[d])) for d in documents]
        return [
            (d, begin - int(starts[d]), min(end, int(ends[d])) - begin) for d, begin in zip(documents, begins)
        ]  # fmt: skip

    def records() -> Iterator[bytes]:
        for row in range(first, last):
            start, end = row * length, min(row * length + length + 1, int(ends[-1]))
            yield record(stream[start - low : end - low], pieces(start, end), length, tokens)

    padding = max(0, last * length + 1 - int(ends[-1]))
    return store.write_shard(path, records(), padding=padding)


def record(row: np.ndarray, pieces: Pieces, length: int, tokens: TokenStore) -> bytes:
    """The bytes of a row, filled up with eos."""
    missing = length + 1 - len(row)
    if missing:
        row = np.concatenate([row, np.full(missing, tokens.manifest["eos_id"], tokens.dtype)])
        pieces = [*pieces, (PADDING, 0, missing)]
    return row.tobytes() + np.array(pieces, "<i8").tobytes()


def best_fit_jobs(ends: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Ranges of neighbouring documents of about a shard's size: each is packed by itself."""
    starts = np.concatenate([[0], ends[:-1]])
    cuts = np.searchsorted(starts, np.arange(0, int(ends[-1]), SHARD_TOKENS))
    cuts = [*np.unique(cuts).tolist(), len(ends)]
    return [(low, high) for low, high in itertools.pairwise(cuts) if low < high]


def pack_best_fit(call: tuple[TokenStore, int, tuple[int, int], pathlib.Path]) -> dict:
    """Write the rows of documents [first, last)."""
    tokens, length, (first, last), path = call
    known = store.finished_shard(path)
    if known is not None:
        return known
    documents = tokens.read(np.arange(first, last))
    rows = best_fit([len(document) for document in documents], length)
    used = sum(size for row in rows for _, _, size in row)

    def records() -> Iterator[bytes]:
        for row in rows:
            content = np.concatenate([documents[d][offset : offset + size] for d, offset, size in row])
            yield record(content, [(first + d, offset, size) for d, offset, size in row], length, tokens)

    return store.write_shard(path, records(), padding=len(rows) * (length + 1) - used)


def best_fit(lengths: list[int], length: int) -> list[Pieces]:
    """Rows of pieces (document, offset, size) whose sizes sum to at most `length` + 1.

    Documents longer than a row are chunked every `length` tokens (chunks share one token). Pieces go, longest first,
    into the row with the least free space that holds them.
    """
    pieces = [
        (document, offset, min(size - offset, length + 1))
        for document, size in enumerate(lengths)
        for offset in range(0, size - 1, length)
    ]
    rows: list[Pieces] = []
    free: dict[int, collections.deque[int]] = {}  # rows by their free space
    spaces: list[int] = []  # the keys of `free`, sorted
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        at = bisect.bisect_left(spaces, piece[2])
        if at == len(spaces):
            row, space = len(rows), length + 1
            rows.append([])
        else:
            space = spaces[at]
            row = free[space].popleft()
            if not free[space]:
                del free[space], spaces[at]
        rows[row].append(piece)
        space -= piece[2]
        if space:
            if space not in free:
                free[space] = collections.deque()
                bisect.insort(spaces, space)
            free[space].append(row)
    return rows
