"""Pictures: the data of an image tokenizer. Parquet files of encoded pictures in; batches of pixels out.

It stands where `Data` stands for text, and gives the training loop what it asks of batches: a function of the step,
fingerprints, accounting. The batch of step k depends on (seed, k) alone.
"""

import functools
import io
import pathlib
from collections.abc import Iterator

import numpy as np

from maxlike.data import files
from maxlike.data.loader import BatchIterator, Piece, check_hosts
from maxlike.data.optional import needs
from maxlike.data.reader import Batch, row_of
from maxlike.data.tokenizers import Tokenizer
from maxlike.errors import UserError

SOURCE = "pictures"  # the one source's name in tables and fingerprints


class Pixels(Tokenizer):
    """Stands where a tokenizer stands: pixels go into the model as they are, so there are no ids. Refuses text."""

    vocab_size, eos_id, bos_id = 0, None, None
    fingerprint = files.digest("Pixels")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        raise UserError("this experiment is of pictures and has no text: name an experiment with a language model")


class PictureFiles:
    """The pictures of Parquet files, encoded as PNG or JPEG, in memory as stored; decoded when they are asked for.

    Refuses a file that is not Parquet, a missing column, and (when it is asked for) a picture that cannot be decoded or
    is smaller than `size`, by file and row.
    """

    def __init__(self, paths: str | tuple[str, ...], size: int, image: str = "image", caption: str = "caption"):
        self.size = size
        self.images: list[bytes] = []
        self.captions: list[str] = []
        self.names: list[str] = []
        content = []
        for path in files.expand(paths, "Pictures.paths"):
            table = _read(path, (image, caption))
            self.images += table[image].to_pylist()
            self.captions += [text or "" for text in table[caption].to_pylist()]
            self.names += [f"{path.name}:{row}" for row in range(table.num_rows)]
            content.append([path.name, files.sha256(path)])
        self.fingerprint = files.digest("PictureFiles", size, image, caption, content)

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, number: int, generator: np.random.Generator | None, flip: bool = False) -> np.ndarray:
        """uint8 [size, size, 3]: a part of the picture where it is larger, in the middle, or anywhere with a generator
        (which also decides on a mirror image)."""
        pixels = decode(self.images[number], self.names[number])
        spare = np.array(pixels.shape[:2]) - self.size
        if spare.min() < 0:
            raise UserError(
                f"picture {self.names[number]} is {pixels.shape[1]} x {pixels.shape[0]} pixels, smaller than "
                f"Pictures.size={self.size}: lower it, or leave the picture out"
            )
        top, left = spare // 2 if generator is None else generator.integers(0, spare + 1)
        pixels = pixels[top : top + self.size, left : left + self.size]
        return pixels[:, ::-1] if flip and generator is not None and generator.random() < 0.5 else pixels


def _read(path: pathlib.Path, columns: tuple[str, ...]):
    parquet = needs("pyarrow.parquet", "pyarrow", "Pictures")
    arrow = needs("pyarrow", "pyarrow", "Pictures")
    try:
        known = parquet.read_schema(path).names
        missing = [column for column in columns if column not in known]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(known)}")
        return parquet.read_table(path, columns=list(columns))
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({error}); write it again") from error


def decode(image: bytes, name: str) -> np.ndarray:
    """uint8 [rows, columns, 3] of an encoded picture; transparent places are white."""
    library = needs("PIL.Image", "pillow", "Pictures")
    try:
        with library.open(io.BytesIO(image)) as picture:
            if picture.mode in ("RGBA", "LA", "PA", "P"):
                layer = picture.convert("RGBA")
                picture = library.new("RGBA", layer.size, "white")
                picture.alpha_composite(layer)
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, TypeError, library.DecompressionBombError) as error:
        raise UserError(f"picture {name} cannot be decoded ({error}); leave it out or write it again") from error


class PictureBatches:
    """The training batches: pictures uint8 [batch_size, size, size, 3] and loss_weights [batch_size], all 1."""

    def __init__(self, source: PictureFiles, *, batch_size: int, sequence_length: int, seed: int, flip: bool):
        self.source, self.batch_size, self.sequence_length = source, batch_size, sequence_length
        self.seed, self.flip = seed, flip

    def identity(self, step: int | None = None) -> dict[str, str]:
        """Named fingerprints of all that decides the batches."""
        return {
            f"source {SOURCE}": self.source.fingerprint,
            "tokenizer": Pixels.fingerprint,
            "order (seed, batch_size)": files.digest("order", self.seed, self.batch_size),
            "transforms": files.digest("flip", self.flip),
        }

    @property
    def fingerprint(self) -> str:
        return files.digest(self.identity())

    def _numbers(self, examples: range) -> list[int]:
        return [row_of(example, len(self.source), self.seed, SOURCE) for example in examples]

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        """The batch of any step, or one host's block of it."""
        check_hosts(self.batch_size, host, hosts)
        share = self.batch_size // hosts
        start = step * self.batch_size + host * share
        examples = range(start, start + share)
        pictures = [
            self.source.picture(number, np.random.Generator(np.random.Philox(key=[self.seed, example])), self.flip)
            for example, number in zip(examples, self._numbers(examples))
        ]
        return {"pictures": np.stack(pictures), "loss_weights": np.ones(share, np.float32)}

    def iterate(self, start_step: int = 0, *, host: int = 0, hosts: int = 1) -> BatchIterator:
        """Batches from `start_step` on, without end, read ahead in a thread."""
        check_hosts(self.batch_size, host, hosts)
        return BatchIterator(functools.partial(self.batch, host=host, hosts=hosts), start_step, workers=0)

    def _of(self, step: int) -> list[int]:
        return self._numbers(range(step * self.batch_size, (step + 1) * self.batch_size))

    def documents(self, step: int) -> list[Piece]:
        """The pictures of a step's batch."""
        return [
            Piece(SOURCE, self.source.names[number], 0, self.sequence_length, row)
            for row, number in enumerate(self._of(step))
        ]

    def text(self, step: int) -> list[str]:
        """The captions of a step's pictures."""
        return [self.source.captions[number] for number in self._of(step)]

    def accounting(self, step: int) -> dict[str, dict[str, float]]:
        """What was read before `step`; a token is an id of a picture."""
        rows = step * self.batch_size
        tokens = rows * self.sequence_length
        epochs = rows / len(self.source)
        return {SOURCE: {"rows": rows, "tokens": tokens, "epochs": epochs, "asked": 1.0, "realised": 1.0}}

    def epochs(self, steps: int) -> dict[str, float]:
        return {SOURCE: self.accounting(steps)[SOURCE]["epochs"]}

    def describe(self, steps: int | None = None) -> list[dict]:
        epochs = {} if steps is None else {"epochs": self.epochs(steps)[SOURCE]}
        return [_described(self.source, self.sequence_length) | epochs]


def _described(source: PictureFiles, length: int) -> dict:
    size = sum(len(image) for image in source.images)
    return {
        "source": SOURCE, "documents": len(source), "tokens": len(source) * length, "bytes": size,
        "rows": len(source), "padding": 0.0, "cut documents": 0, "skipped": 0, "inexact": 0,
    }  # fmt: skip


class FinitePictures:
    """The validation batches: every picture once, in order, uncropped where it has the right size, else its middle; the
    last batch is filled up with pictures whose loss_weights are 0."""

    names = (SOURCE,)

    def __init__(self, source: PictureFiles, *, batch_size: int, sequence_length: int):
        self.source, self.batch_size, self.sequence_length = source, batch_size, sequence_length
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def batch(self, step: int, *, host: int = 0, hosts: int = 1) -> Batch:
        check_hosts(self.batch_size, host, hosts)
        if not 0 <= step < len(self):
            raise IndexError(f"validation batch {step} of {len(self)}")
        share = self.batch_size // hosts
        first = step * self.batch_size + host * share
        size = self.source.size
        pictures = np.zeros((share, size, size, 3), np.uint8)
        weights = np.zeros(share, np.float32)
        for row, number in enumerate(range(first, min(first + share, len(self.source)))):
            pictures[row], weights[row] = self.source.picture(number, None), 1.0
        return {"pictures": pictures, "loss_weights": weights}

    def iterate(self, *, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        return (self.batch(step, host=host, hosts=hosts) for step in range(len(self)))

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate()

    def describe(self) -> list[dict]:
        return [_described(self.source, self.sequence_length)]


class Pictures:
    """Pictures to batches, for `Experiment.data` of an image tokenizer.

    Experiment.sequence_length is then the number of ids of a picture, and Experiment.batch_size counts pictures, so
    that rates and durations count ids as tokens.

    paths: Parquet files of training pictures (`package:...` and patterns as for text). validation: held-out ones, or
    None. image, caption: their columns (encoded pictures, texts). size: pixels a side; a larger picture is cut,
    anywhere for training, in the middle otherwise. flip: mirror half of the training pictures.
    Refuses a size below 1, and what PictureFiles refuses.
    """

    def __init__(
        self,
        *,
        paths: str | tuple[str, ...],
        size: int,
        validation: str | tuple[str, ...] | None = None,
        image: str = "image",
        caption: str = "caption",
        flip: bool = False,
    ):
        if size < 1:
            raise UserError(f"Pictures.size={size} must be at least 1 pixel")
        self.paths, self.validation, self.size = paths, validation, size
        self.image, self.caption, self.flip = image, caption, flip
        self.tokenizer = Pixels()

    def open(self, paths: str | tuple[str, ...]) -> PictureFiles:
        """The pictures of files, with this object's size and columns."""
        return PictureFiles(paths, self.size, self.image, self.caption)

    def train(self, *, sequence_length: int, batch_size: int, seed: int, steps: int | None = None) -> PictureBatches:
        """The training batches: a function of the step."""
        if batch_size < 1 or seed < 0:
            raise UserError(f"batch_size={batch_size} must be at least 1 and seed={seed} not negative")
        return PictureBatches(
            self.open(self.paths), batch_size=batch_size, sequence_length=sequence_length, seed=seed, flip=self.flip
        )

    def open_validation(self, *, sequence_length: int, batch_size: int) -> FinitePictures:
        """The validation batches: every picture once. Refuses where no validation files are bound."""
        if self.validation is None:
            raise UserError("Pictures.validation is not set; bind held-out pictures, or switch validation off")
        return FinitePictures(self.open(self.validation), batch_size=batch_size, sequence_length=sequence_length)

    def verify(self, *, sequence_length: int) -> int:
        """Decode every picture; the number of files. Refuses a damaged one by name."""
        count = 0
        for paths in (self.paths, self.validation):
            if paths is not None:
                source = self.open(paths)
                for number in range(len(source)):
                    source.picture(number, None)
                count += len({name.rpartition(":")[0] for name in source.names})
        return count
