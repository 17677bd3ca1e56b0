"""Variants of few pictures as many documents: mirrored, moved and recoloured, then spelled by an image tokenizer.

    python -m maxlike.picture_variants FOLDER [COUNT]

writes FOLDER/variants.parquet with COUNT variants of each picture, 8 if it is left out, as
`experiments/data/clipart/tokens` ships them: a language model that reads the 1,112 pictures themselves several times
learns them by heart, and the more so the more parameters it has. There are at most 588 of a picture that differ.
"""

import io
import pathlib
import sys

import numpy as np

from maxlike.data import files
from maxlike.data.optional import needs
from maxlike.data.pictures import PictureFiles
from maxlike.errors import UserError
from maxlike.image_tokens import TrainedImageTokenizer, documents

PICTURES = "package:experiments/data/clipart/train.parquet"
TOKENIZER = "package:experiments/data/clipart/tokens"
COLOURS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
MOST_PIXELS = 3  # of a move; the rim that it uncovers is white, as the shipped pictures' ground is


class Variants:
    """`count` variants of each picture of `source`, in the form of PictureFiles. The first is the picture itself; each
    other is mirrored or not, moved by up to 3 pixels in each direction, and has its colours exchanged, all drawn from
    its number. Captions stay as they are.

    Refuses a count below 1.
    """

    def __init__(self, source: PictureFiles, count: int):
        if count < 1:
            raise UserError(f"Variants.count={count} must be at least 1, the picture itself")
        self.source, self.count = source, count
        self.captions = [caption for caption in source.captions for _ in range(count)]
        self.names = [f"{name} variant {variant}" for name in source.names for variant in range(count)]

    def __len__(self) -> int:
        return len(self.source) * self.count

    def picture(self, number: int, generator: np.random.Generator | None) -> np.ndarray:
        """uint8 [size, size, 3]."""
        of, variant = divmod(number, self.count)
        pixels = self.source.picture(of, None)
        return pixels if variant == 0 else varied(pixels, np.random.Generator(np.random.Philox(key=[of, variant])))


def varied(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One variant of a picture uint8 [size, size, 3]."""
    mirrored = pixels[:, ::-1] if generator.random() < 0.5 else pixels
    recoloured = mirrored[..., COLOURS[generator.integers(len(COLOURS))]]
    rim = ((MOST_PIXELS, MOST_PIXELS), (MOST_PIXELS, MOST_PIXELS), (0, 0))
    top, left = generator.integers(0, 2 * MOST_PIXELS + 1, 2)
    wide = np.pad(recoloured, rim, constant_values=255)
    return wide[top : top + pixels.shape[0], left : left + pixels.shape[1]]


def write(destination: pathlib.Path, count: int = 8, batch_size: int = 64) -> pathlib.Path:
    """The documents of the shipped pictures' variants, as Parquet."""
    arrow, parquet = (needs(name, "pyarrow", "picture_variants") for name in ("pyarrow", "pyarrow.parquet"))
    tokenizer = TrainedImageTokenizer.load(TOKENIZER)
    texts = documents(Variants(PictureFiles(PICTURES, tokenizer.size), count), tokenizer, batch_size)
    buffer = io.BytesIO()
    parquet.write_table(arrow.table({"text": texts}), buffer, compression="zstd")
    destination.mkdir(parents=True, exist_ok=True)
    files.replace(destination / "variants.parquet", buffer.getvalue())
    return destination / "variants.parquet"


if __name__ == "__main__":
    print(write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:3])))
