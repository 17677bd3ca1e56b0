"""Made-up documents: random ids of any vocabulary, through the data layers that every run uses."""

import pathlib

import numpy as np

from maxlike.data import files, reader
from maxlike.data.data import Data
from maxlike.data.reader import Batch
from maxlike.data.rows import PADDING
from maxlike.data.sources import Text
from maxlike.data.tokenizers import Tokenizer

# Rows in an epoch, by the batch: so that an epoch ends inside a batch.
ROWS_A_BATCH = 2.5


class Numbers(Tokenizer):
    """Ids written as numbers with blanks between them, so that a text can hold any id of a vocabulary. 0 opens and
    closes a document; every other id stands for one byte.

    vocab_size: at least 2.
    """

    eos_id = bos_id = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.fingerprint = files.digest("Numbers", vocab_size)
        self.bytes_per_token = np.minimum(np.arange(vocab_size), 1).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(text.split(), np.int32) for text in texts]

    def text_bytes(self, text: str) -> int:
        return len(text.split())

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids if i)


def data(folder: pathlib.Path, *, vocab: int, batch_size: int, length: int) -> Data:
    """A corpus in `folder` whose epoch is two batches and a half of rows of `length` tokens."""
    random = np.random.default_rng(0)
    left, documents = int(ROWS_A_BATCH * batch_size * length), []
    while left > 2:
        size = min(int(random.integers(3, length + length // 2)), left)
        documents.append(" ".join(str(i) for i in random.integers(1, vocab, size - 2)))  # bos and eos are added
        left -= size
    path = folder / "documents.txt"
    path.write_text("\n\n".join(documents))
    return Data(sources=Text(paths=str(path), separator=r"\n\n"), tokenizer=Numbers(vocab), cache=str(folder / "cache"))


def packed_and_separate(*, vocab: int, rows: int, length: int) -> tuple[Batch, Batch, np.ndarray]:
    """(batch of packed rows, batch of the same documents a row each, where each token of the first is in the second).

    Three documents and some padding a packed row. The places are int [rows, length, 2], row and position; -1 in both
    where there is padding.
    """
    random = np.random.default_rng(1)
    bytes_per_token = Numbers(vocab).bytes_per_token
    packed_pieces, alone_pieces, packed_tokens, alone_tokens = [], [], [], []
    places = np.full((rows, length, 2), -1)
    for row in range(rows):
        cuts = np.sort(random.choice(np.arange(4, length - 8), 2, replace=False))
        sizes = [int(cuts[0]), int(cuts[1] - cuts[0]), length - 4 - int(cuts[1])]
        ids = random.integers(1, vocab, length + 1)
        at = 0
        for size in [size for size in sizes if size]:
            number = len(alone_tokens)
            alone = np.zeros(length + 1, np.int64)
            alone[:size] = ids[at : at + size]
            alone_tokens.append(alone)
            alone_pieces.append([(number, 0, size), (PADDING, 0, length + 1 - size)])
            places[row, at : at + size] = np.stack([np.full(size, number), np.arange(size)], 1)
            at += size
        pieces = [(number, 0, size) for number, size in enumerate(sizes) if size]
        packed_pieces.append([*pieces, (PADDING, 0, length + 1 - at)])
        packed_tokens.append(ids)

    def batch(tokens: list[np.ndarray], pieces: list[list[tuple[int, int, int]]]) -> Batch:
        counts = np.array([len(row) for row in pieces])
        fields = reader.fields_of(
            np.stack(tokens).astype(np.int32), np.array([p for row in pieces for p in row]), counts
        )
        return reader.shift(fields, bytes_per_token)

    return batch(packed_tokens, packed_pieces), batch(alone_tokens, alone_pieces), places
