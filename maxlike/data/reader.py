"""Rows to batches: reading, segments, positions, the shift to targets, and which rows an example number means.

Example number -> (source, key) by the mixture, key -> row by a permutation of the source's rows that is drawn anew each
epoch. Pure functions of numbers and of what is on disk, so any process can compute any batch.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import grain
import numpy as np

from maxlike.data.mixture import Interleave
from maxlike.data.rows import PADDING, Rows
from maxlike.errors import UserError

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Batch]
_ROUNDS = 4  # of Grain's index permutation, as in its own shuffle
_SMALL = 1 << 16  # rows; Grain's permutation walks through numbers of 16 bits, so it is slow below


def fields_of(tokens: np.ndarray, pieces: np.ndarray, counts: np.ndarray) -> Batch:
    """Rows as read -> tokens, segment_ids (from 1, 0 padding) and positions (from 0 in each piece of a document),
    all int32 [B, L + 1]."""
    lengths = pieces[:, 2]
    if lengths.sum() != tokens.size or counts.sum() != len(pieces):
        raise UserError("A row's pieces do not fill it: the row layer is damaged; remove it and it is built again")
    first = np.repeat(np.cumsum(counts) - counts, counts)
    segment = np.where(pieces[:, 0] == PADDING, 0, np.arange(len(pieces)) - first + 1)
    begin = np.cumsum(lengths) - lengths
    return {
        "tokens": tokens,
        "segment_ids": np.repeat(segment, lengths).astype(np.int32).reshape(tokens.shape),
        "positions": (np.arange(tokens.size) - np.repeat(begin, lengths)).astype(np.int32).reshape(tokens.shape),
    }


def shift(fields: Batch, bytes_per_token: np.ndarray) -> Batch:
    """Inputs and the targets one to the right: the batch that objectives read, all [..., L].

    loss_weights is 0, and target_bytes with it, where the target is padding or belongs to another document than the
    input. Fields other than tokens, segment_ids and positions are handed on as they are.
    """
    tokens, segments = fields["tokens"], fields["segment_ids"]
    same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    targets = np.ascontiguousarray(tokens[..., 1:])
    others = {name: value for name, value in fields.items() if name not in ("tokens", "segment_ids", "positions")}
    return {
        "inputs": np.ascontiguousarray(tokens[..., :-1]),
        "targets": targets,
        "segment_ids": np.ascontiguousarray(segments[..., :-1]),
        "positions": np.ascontiguousarray(fields["positions"][..., :-1]),
        "loss_weights": same.astype(np.float32),
        "target_bytes": np.where(same, bytes_per_token[targets], 0).astype(np.int32),
    } | others


def seed_of(*parts) -> int:
    """A 32-bit seed from plain values."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest(), "big")


@functools.lru_cache(maxsize=32)
def small_order(count: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. count - 1: the order of hashes (the finaliser of splitmix64) of (seed, number)."""
    hashes = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    for multiplier, shift_by in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27), (1, 31)):
        hashes = (hashes ^ (hashes >> np.uint64(shift_by))) * np.uint64(multiplier)
    return np.argsort(hashes, kind="stable")


def row_of(key: int, count: int, seed: int, name: str) -> int:
    """The row that a source of `count` rows gives at `key`: each epoch is a permutation of its own."""
    epoch, within = divmod(key, count)
    epoch_seed = seed_of("order", seed, name, epoch)
    if count <= _SMALL:
        return int(small_order(count, epoch_seed)[within])
    return grain.experimental.index_shuffle(within, max_index=count - 1, seed=epoch_seed, rounds=_ROUNDS)


class Reader:
    """What worker processes need of a run: row layers, the mixture, seeds; called with a step, gives its batch."""

    def __init__(
        self,
        rows: Sequence[Rows],
        interleave: Interleave,
        *,
        batch_size: int,
        seed: int,
        transforms: tuple[Transform, ...],
        bytes_per_token: np.ndarray,
    ):
        self.rows, self.interleave = tuple(rows), interleave
        self.batch_size, self.seed, self.transforms = batch_size, seed, transforms
        self.bytes_per_token = bytes_per_token

    def places(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of examples. Within an epoch of a source each of its rows comes once."""
        sources, keys = self.interleave.locate(examples)
        rows = np.zeros(len(examples), np.int64)
        for at, (source, key) in enumerate(zip(sources.tolist(), keys.tolist())):
            rows[at] = row_of(key, self.rows[source].count, self.seed, self.interleave.names[source])
        return sources, rows

    def read(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of examples as `Rows.read` gives them."""
        sources, numbers = self.places(examples)
        used = np.unique(sources)
        if len(used) == 1:
            return self.rows[used[0]].read(numbers)
        tokens, pieces, counts = [None] * len(examples), [None] * len(examples), np.zeros(len(examples), np.int64)
        for source in used:
            at = np.flatnonzero(sources == source)
            row_tokens, row_pieces, row_counts = self.rows[source].read(numbers[at])
            parts = np.split(row_pieces, np.cumsum(row_counts)[:-1])
            for place, row, part, count in zip(at, row_tokens, parts, row_counts):
                tokens[place], pieces[place], counts[place] = row, part, count
        return np.stack(tokens), np.concatenate(pieces), counts

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """The block of a step's batch that belongs to one host."""
        share = self.batch_size // hosts
        start = step * self.batch_size + host * share
        examples = np.arange(start, start + share)
        fields = fields_of(*self.read(examples))
        if not self.transforms:
            return shift(fields, self.bytes_per_token)
        rows = [self._transformed(fields, at, int(example)) for at, example in enumerate(examples)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _transformed(self, fields: Batch, at: int, example: int) -> Batch:
        row = {name: value[at].copy() for name, value in fields.items()}
        generator = np.random.Generator(np.random.Philox(key=[self.seed, example]))
        for transform in self.transforms:
            row = transform(row, generator)
        return shift(row, self.bytes_per_token) if "tokens" in row else row


class HostBatch:
    """One host's batch of a step: the function that Grain maps over the steps."""

    def __init__(self, reader: Reader, host: int, hosts: int):
        self.reader, self.host, self.hosts = reader, host, hosts

    def __call__(self, step: int) -> Batch:
        return self.reader.batch(step, self.host, self.hosts)
