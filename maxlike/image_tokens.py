"""A trained image tokenizer as two files, and `--job tokenize_images`, which writes pictures and captions as text.

The files: `image_tokenizer.gin`, its configuration, and `image_tokenizer.npz`, its parameters by path, float32. The
fingerprint is of the parameters and of what turns them into ids.
"""

import hashlib
import io
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np
from flax import nnx

from maxlike import config
from maxlike.checkpoint_tree import flatten
from maxlike.data import files
from maxlike.data.mixed import spell
from maxlike.data.optional import needs
from maxlike.data.pictures import PictureFiles, Pictures
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.manifest import write_text
from maxlike.objectives.reconstruction import to_pixels
from maxlike.report.picture_grid import to_uint8
from maxlike.restore import restore

GIN, NPZ = "image_tokenizer.gin", "image_tokenizer.npz"


class TrainedImageTokenizer:
    """An image tokenizer with its numbers: pictures (uint8 [B, S, S, 3]) to ids (int32 [B, length]) and back.

    graph, params, buffers: the model. Refuses one with several books (a document's picture is one row of ids), and ids
    outside its vocabulary.
    """

    def __init__(self, graph: Any, params: dict, buffers: dict):
        self.params, self.buffers = params, buffers
        model = nnx.merge(graph, params, buffers)
        if model.quantizer.books != 1:
            raise UserError(
                f"an image tokenizer with {model.quantizer.books} books makes several ids a place, and a document's "
                "picture is one row of ids: train one with a single book, such as FSQ"
            )
        self.vocab, self.length, self.size = model.vocab, model.length, model.size
        digest = hashlib.sha256(repr([type(model.quantizer).__name__, self.vocab, self.size, self.length]).encode())
        for name, leaf in sorted(flatten({"params": params, "buffers": buffers}).items()):
            digest.update(f"{name} {leaf.shape}".encode() + np.asarray(leaf, np.float32).tobytes())
        self.fingerprint = digest.hexdigest()[:32]
        self._encode = jax.jit(lambda p, b, x: nnx.merge(graph, p, b).encode(to_pixels(x)))
        self._decode = jax.jit(lambda p, b, ids: nnx.merge(graph, p, b).decode(ids))

    def encode(self, pictures: np.ndarray) -> np.ndarray:
        return np.asarray(self._encode(self.params, self.buffers, pictures))

    def decode(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int32)
        if ids.shape[1:] != (self.length,) or ids.min(initial=0) < 0 or ids.max(initial=0) >= self.vocab:
            raise UserError(
                f"ids of shape {ids.shape} in {ids.min(initial=0)}..{ids.max(initial=0)} are no pictures: the image "
                f"tokenizer takes rows of {self.length} ids below {self.vocab}"
            )
        return to_uint8(np.asarray(self._decode(self.params, self.buffers, ids)))

    def save(self, folder: pathlib.Path, configuration: str) -> None:
        """Writes both files; configuration: the gin text of the experiment."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **flatten({"params": self.params, "buffers": self.buffers}))
        write_text(folder / GIN, configuration)
        files.replace(folder / NPZ, buffer.getvalue())

    @classmethod
    def load(cls, path: str) -> "TrainedImageTokenizer":
        """The tokenizer of a folder that `save` wrote; `package:...` names one shipped with a package."""
        folder = files.resolve(path, "image_tokenizer")
        for name in (GIN, NPZ):
            if not (folder / name).is_file():
                raise UserError(f"{folder} holds no {name}: name a folder that `--job tokenize_images` wrote")
        abstract = config.load(str(folder / GIN)).abstract_model()
        wanted = {"params": abstract.params, "buffers": abstract.buffers}
        try:
            with np.load(folder / NPZ, allow_pickle=False) as saved:
                there = {name: saved[name] for name in saved.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{folder / NPZ} is damaged ({error}); write it again") from error
        shapes = {name: leaf.shape for name, leaf in flatten(wanted).items()}
        if {name: leaf.shape for name, leaf in there.items()} != shapes:
            raise UserError(f"{folder / NPZ} does not fit {GIN} beside it: write both again")
        state = jax.tree.unflatten(jax.tree.structure(wanted), [there[name] for name in shapes])
        return cls(abstract.graph, state["params"], state["buffers"])


def documents(source: PictureFiles, tokenizer: TrainedImageTokenizer, batch_size: int) -> list[str]:
    """The text of each picture with its caption: the caption first or the picture first, decided by a hash of the
    picture's name and caption, each for half of them (arXiv 2407.21770, section 3.1)."""
    texts = []
    for start in range(0, len(source), batch_size):
        numbers = list(range(start, min(start + batch_size, len(source))))
        pictures = np.stack([source.picture(number, None) for number in numbers])
        filled = np.concatenate([pictures, np.zeros((batch_size - len(numbers), *pictures.shape[1:]), np.uint8)])
        for number, codes in zip(numbers, tokenizer.encode(filled)):
            picture, caption = spell(codes, tokenizer.fingerprint), source.captions[number]
            first = int(files.digest("picture first", source.names[number], caption), 16) % 2
            texts.append(f"{picture}\n{caption}" if first else f"{caption}\n{picture}")
    return texts


def tokenize_images(
    experiment: Experiment,
    run_dir: pathlib.Path,
    *,
    destination: str,
    checkpoint: int | None = None,
    batch_size: int = 64,
) -> None:
    """Turns an image tokenizer's pictures and captions into documents that `data.Data` mixes with text.

    Writes train.parquet and validation.parquet (column `text`, read by the source Parquet with the tokenizer
    `mixed.TextAndPictures`) and the trained tokenizer itself into the folder `destination`, and prints what to bind.

    checkpoint: the step to use; by default the newest. batch_size: pictures encoded at a time.
    """
    if not isinstance(experiment.data, Pictures):
        raise UserError("tokenize_images needs an experiment whose data are Pictures, such as image_tokenizer")
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} must be at least 1")
    arrow, parquet = (needs(name, "pyarrow", "tokenize_images") for name in ("pyarrow", "pyarrow.parquet"))
    program, state, step = restore(experiment, run_dir, checkpoint)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), jax.device_get(program.trained(state)))
    tokenizer = TrainedImageTokenizer(program.model.graph, params, jax.device_get(state["buffers"]))
    folder = pathlib.Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    for name, paths in (("train", experiment.data.paths), ("validation", experiment.data.validation)):
        if paths is not None:
            texts = documents(experiment.data.open(paths), tokenizer, batch_size)
            buffer = io.BytesIO()
            parquet.write_table(arrow.table({"text": texts}), buffer, compression="zstd")
            files.replace(folder / f"{name}.parquet", buffer.getvalue())
            print(f"{folder / f'{name}.parquet'}: {len(texts)} documents of {tokenizer.length} ids and a caption")
    tokenizer.save(folder, experiment.config.text() if experiment.config else "")
    print(f"{folder / NPZ}: the image tokenizer after step {step}")
    print(f"mixed.TextAndPictures.codes = {tokenizer.vocab}")
    print(f"mixed.TextAndPictures.image_tokenizer = {tokenizer.fingerprint!r}")
