"""Hooks of experiments with pictures."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from maxlike.data.mixed import TextAndPictures, open_picture
from maxlike.decode.generate import Generator
from maxlike.decode.sampling import Sampling
from maxlike.errors import UserError
from maxlike.hooks import Hook
from maxlike.image_tokens import TrainedImageTokenizer
from maxlike.objectives.reconstruction import to_pixels
from maxlike.report.picture_grid import grid, to_uint8

if TYPE_CHECKING:
    from maxlike.train import Training


class Reconstructions(Hook):
    """Writes `reconstructions.png` into the run: held-out pictures, each above what the tokenizer makes of it, every
    `every` steps and after the last one.

    count: pictures, at most a validation batch; columns: in a row. Needs `Pictures.validation`.
    """

    def __init__(self, *, every: int = 500, count: int = 32, columns: int = 16):
        if every < 1 or count < 1 or columns < 1:
            raise UserError(f"Reconstructions.every={every}, count={count}, columns={columns}: each must be at least 1")
        self.every, self.count, self.columns = every, count, columns

    def open(self, training: "Training") -> None:
        self.training = training
        batch = training.experiment.open_validation().batch(0)
        self.pictures = batch["pictures"][batch["loss_weights"] > 0][: self.count]
        graph = training.program.model.graph
        self.reconstruct = jax.jit(lambda p, b, x: nnx.merge(graph, p, b)(to_pixels(x)).pixels_BSSC)

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step % self.every and step != self.training.experiment.steps:
            return
        self.training.log.flush()
        params = self.training.program.trained(state)
        decoded = to_uint8(jax.device_get(self.reconstruct(params, state["buffers"], self.pictures)))
        if jax.process_index() == 0:
            path = self.training.run.file("reconstructions.png")
            path.write_bytes(grid(in_pairs(self.pictures, decoded, self.columns)))


def in_pairs(above: np.ndarray, below: np.ndarray, columns: int) -> list[np.ndarray]:
    """Rows of `columns` pictures, each followed by the row of their counterparts."""
    rows = []
    for start in range(0, len(above), columns):
        rows += [above[start : start + columns], below[start : start + columns]]
    return rows


class SamplePictures(Hook):
    """Writes `samples.png` into the run: for each caption, `count` pictures that the language model makes of it, a row
    a caption, every `every` steps and after the last one.

    image_tokenizer: the folder that `--job tokenize_images` wrote (`package:...` for a shipped one), which turns ids
    back into pixels. temperature, top_p: see `maxlike.decode.sampling.Sampling`. A picture that ends too early, or is
    interrupted by text, is left white, and said.
    Needs a tokenizer TextAndPictures; refuses an image tokenizer other than the data's.
    """

    def __init__(
        self,
        *,
        image_tokenizer: str,
        captions: tuple[str, ...],
        count: int = 8,
        every: int = 500,
        temperature: float = 1.0,
        top_p: float = 0.95,
    ):
        if every < 1 or count < 1 or not captions:
            raise UserError(f"SamplePictures.every={every}, count={count} must be at least 1 and captions not be empty")
        self.image_tokenizer, self.captions = image_tokenizer, tuple(captions)
        self.count, self.every = count, every
        self.sampling = Sampling(temperature=temperature, top_p=top_p)

    def open(self, training: "Training") -> None:
        self.training, experiment = training, training.experiment
        self.ids = experiment.data.tokenizer
        if not isinstance(self.ids, TextAndPictures):
            raise UserError("SamplePictures needs Data.tokenizer to be mixed.TextAndPictures")
        self.decoder = TrainedImageTokenizer.load(self.image_tokenizer)
        if self.decoder.fingerprint != self.ids.image_tokenizer:
            raise UserError(
                f"SamplePictures.image_tokenizer={self.image_tokenizer!r} has the fingerprint "
                f"{self.decoder.fingerprint} and the data were made by {self.ids.image_tokenizer}: name the folder of "
                "that one"
            )
        asked = open_picture(self.ids.image_tokenizer)
        self.prompts = [f"{caption}\n{asked}" for caption in self.captions for _ in range(self.count)]
        self.generator = Generator(training.program.model.graph, self.ids, max_length=experiment.sequence_length)

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step % self.every and step != self.training.experiment.steps:
            return
        self.training.log.flush()
        made = self.generator.continuations(
            self.training.program.trained(state),
            self.prompts,
            buffers=state["buffers"],
            max_new=self.decoder.length,
            sampling=self.sampling,
        )
        pictures = [self._picture(continuation.tokens) for continuation in made]
        whole = sum(picture is not None for picture in pictures)
        if whole < len(pictures):
            self.training.log.say(f"step {step}: {len(pictures) - whole} of {len(pictures)} pictures are not whole")
        white = np.full((self.decoder.size, self.decoder.size, 3), 255, np.uint8)
        shown = [white if picture is None else picture for picture in pictures]
        if jax.process_index() == 0:
            rows = [shown[start : start + self.count] for start in range(0, len(shown), self.count)]
            self.training.run.file("samples.png").write_bytes(grid(rows))

    def _picture(self, tokens: np.ndarray) -> np.ndarray | None:
        """The picture that a continuation of a begin marker spells, or None."""
        codes = self.ids.pictures([self.ids.begin_id, *tokens.tolist()])[0]
        return self.decoder.decode(codes[None])[0] if len(codes) == self.decoder.length else None
