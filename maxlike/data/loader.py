"""Batches as a function of the step, and Grain to read them ahead.

The batch of step k depends on (seed, k, mixture) alone, and hosts take contiguous blocks of every global batch. So the
position of a run is one integer, the step, whatever the number of hosts, workers or restarts.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import absl.flags
import grain
import numpy as np

from maxlike.data import files
from maxlike.data.reader import Batch, HostBatch, Reader, Transform, fields_of, shift
from maxlike.data.rows import PADDING
from maxlike.data.tokenizers import Tokenizer
from maxlike.errors import UserError

if TYPE_CHECKING:
    from maxlike.data.data import Layers

_READ_AHEAD = 4  # batches


class BatchIterator:
    """Batches from a step on, read ahead in a thread or in worker processes. `step` is that of the next batch: the
    whole state. Close it (or use it in a `with`), so that no worker outlives it."""

    def __init__(self, function: Callable[[int], Batch], start_step: int, workers: int):
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # in a notebook nobody has; Grain reads its defaults from there
        steps = grain.MapDataset.range(start_step, sys.maxsize).map(function)
        ahead = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD))
        if workers:
            ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
        self._batches = iter(ahead)
        self.step = start_step

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop reading ahead and end the workers. Closing twice is no error; a closed iterator is at its end."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def check_hosts(batch_size: int, host: int, hosts: int) -> None:
    """Refuse a batch that the hosts cannot share equally."""
    if hosts < 1 or batch_size % hosts or not 0 <= host < hosts:
        raise UserError(
            f"batch_size={batch_size} cannot be shared by {hosts} hosts (this is {host}); make it a multiple"
        )


def transform_identity(transform: Transform) -> list:
    """What a transform is, as plain values: its name and, for an object, its attributes."""
    if inspect.isfunction(transform):
        return [transform.__module__, transform.__qualname__]
    kind = type(transform)
    return [kind.__module__, kind.__qualname__, {name: repr(value) for name, value in sorted(vars(transform).items())}]


class Piece(NamedTuple):
    """A piece of a document in a batch: `document` is its name (`file:index`), offset and length are in tokens (bos
    and eos included), `row` is its row of the global batch."""

    source: str
    document: str
    offset: int
    length: int
    row: int


class Batches:
    """The training batches of a run. Fields as in `shift`, [batch_size, sequence_length], plus what transforms add.

    Made by `Data.train`. `fingerprint` identifies the whole schedule, `identity(step)` what decided the batches
    before a step, so that a run may be branched into another mixture.
    """

    def __init__(self, layers: "dict[str, Layers]", reader: Reader, tokenizer: Tokenizer, workers: int):
        self._layers, self._reader, self._tokenizer, self._workers = layers, reader, tokenizer, workers
        self.batch_size = reader.batch_size
        self.sequence_length = reader.rows[0].length

    def identity(self, step: int | None = None) -> dict[str, str]:
        """Named fingerprints of all that decides the batches before `step` (None: all batches)."""
        interleave = self._reader.interleave
        examples = interleave.starts[-1] + 1 if step is None else step * self.batch_size
        used = {
            name
            for start, weights in zip(interleave.starts, interleave.weights)
            for name, weight in zip(interleave.names, weights)
            if weight and (start < examples or start == 0)
        }
        sources = {f"source {name}": layers.rows.fingerprint for name, layers in self._layers.items() if name in used}
        order = [self._reader.seed, self.batch_size, self.sequence_length]
        return sources | {
            "tokenizer": self._tokenizer.fingerprint,
            "mixture": interleave.history(examples),
            "order (seed, batch_size, sequence_length)": files.digest("order", order),
            "transforms": files.digest([transform_identity(transform) for transform in self._reader.transforms]),
        }

    @property
    def fingerprint(self) -> str:
        return files.digest(self.identity())

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        """The batch of any step, or one host's block of it."""
        check_hosts(self.batch_size, host, hosts)
        return self._reader.batch(step, host, hosts)

    def iterate(self, start_step: int = 0, *, host: int = 0, hosts: int = 1) -> BatchIterator:
        """Batches from `start_step` on, without end, read ahead with Data.workers processes (0: a thread)."""
        check_hosts(self.batch_size, host, hosts)
        return BatchIterator(HostBatch(self._reader, host, hosts), start_step, self._workers)

    def documents(self, step: int) -> list[Piece]:
        """The pieces of documents in a step's batch, row by row."""
        sources, _, pieces, counts = self._read(step)
        rows = np.repeat(np.arange(self.batch_size), counts)
        names = [self._reader.interleave.names[source] for source in sources]
        return [
            Piece(names[row], self._layers[names[row]].tokens.name(document), offset, length, int(row))
            for row, (document, offset, length) in zip(rows, pieces.tolist())
            if document != PADDING
        ]

    def text(self, step: int) -> list[str]:
        """The text of each of `documents(step)`, before transforms; special tokens left out."""
        _, tokens, pieces, _ = self._read(step)
        parts = np.split(tokens.reshape(-1), np.cumsum(pieces[:, 2])[:-1])
        return [self._tokenizer.decode(part) for part, piece in zip(parts, pieces) if piece[0] != PADDING]

    def _read(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The source of each row of a step, and its rows as `Rows.read` gives them."""
        examples = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self._reader.interleave.locate(examples)[0], *self._reader.read(examples)

    def accounting(self, step: int) -> dict[str, dict[str, float]]:
        """What each source has given before `step`: rows, tokens (rows times sequence_length), epochs, and its share of
        all rows, asked (by the weights) and realised."""
        interleave, examples = self._reader.interleave, step * self.batch_size
        counts, expected = interleave.counts(examples), interleave.expected(max(examples, 1)) / max(examples, 1)
        return {
            name: {
                "rows": int(count),
                "tokens": int(count) * self.sequence_length,
                "epochs": int(count) / rows.count,
                "asked": float(asked),
                "realised": int(count) / max(examples, 1),
            }
            for name, count, asked, rows in zip(interleave.names, counts, expected, self._reader.rows)
        }

    def epochs(self, steps: int) -> dict[str, float]:
        """How often a run of so many steps reads each source."""
        return {name: given["epochs"] for name, given in self.accounting(steps).items()}

    def describe(self, steps: int | None = None) -> list[dict]:
        """A table, a row a source: what it holds, what was left out, and how often `steps` steps read it."""
        epochs = {} if steps is None else {name: {"epochs": value} for name, value in self.epochs(steps).items()}
        return [layers.describe(name) | epochs.get(name, {}) for name, layers in self._layers.items()]


class FiniteBatches:
    """Validation batches: every row of every source once, in a fixed order; the last batch is filled up with rows
    whose loss_weights are 0. So every token but the first of each document is a target exactly once."""

    def __init__(self, layers: "dict[str, Layers]", *, batch_size: int, bytes_per_token: np.ndarray, eos_id: int):
        self._layers, self.batch_size = layers, batch_size
        self._bytes_per_token, self._eos_id = bytes_per_token, eos_id
        self._starts = np.cumsum([0, *(layer.rows.count for layer in layers.values())])
        self.sequence_length = next(iter(layers.values())).rows.length
        self.names = tuple(layers)
        self.fingerprint = files.digest({name: layer.rows.fingerprint for name, layer in layers.items()})

    @property
    def rows(self) -> int:
        """Without those that fill up the last batch."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def of(self, name: str) -> "FiniteBatches":
        """The batches of one source alone."""
        if name not in self._layers:
            raise UserError(f"There is no validation source {name!r}; there are {', '.join(self._layers)}")
        one = {name: self._layers[name]}
        return FiniteBatches(
            one, batch_size=self.batch_size, bytes_per_token=self._bytes_per_token, eos_id=self._eos_id
        )

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        """Batch number `step`, or one host's block of it."""
        check_hosts(self.batch_size, host, hosts)
        if not 0 <= step < len(self):
            raise IndexError(f"validation batch {step} of {len(self)}")
        share = self.batch_size // hosts
        first = step * self.batch_size + host * share
        blocks = []
        for start, end, layer in zip(self._starts, self._starts[1:], self._layers.values()):
            numbers = np.arange(max(first, start), min(first + share, end)) - start
            if len(numbers):
                blocks.append(fields_of(*layer.rows.read(numbers)))
        missing = share - sum(len(block["tokens"]) for block in blocks)
        shape = (missing, self.sequence_length + 1)
        filler = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
        blocks.append(filler | {"tokens": np.full(shape, self._eos_id, np.int32)})
        return shift(
            {name: np.concatenate([block[name] for block in blocks]) for name in filler | {"tokens": None}},
            self._bytes_per_token,
        )

    def iterate(self, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        return (self.batch(step, host=host, hosts=hosts) for step in range(len(self)))

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def describe(self) -> list[dict]:
        """A table, a row a source."""
        return [layers.describe(name) for name, layers in self._layers.items()]
