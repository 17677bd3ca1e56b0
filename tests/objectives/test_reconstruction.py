"""The objective of image tokenizers, against its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.image_tokenizer import Reconstruction as Output
from maxlike.errors import UserError
from maxlike.objectives.reconstruction import Reconstruction, code_statistics, to_pixels


@dataclasses.dataclass
class Shifted:
    """Gives back the pictures a little brighter, with ids and a loss of its own."""

    ids: np.ndarray
    by: np.ndarray
    length: int = 4
    vocab: int = 10

    def __call__(self, pixels, key):
        return Output(pixels + self.by[:, None, None, None], self.ids, {"loss": jnp.float32(0.5)})


BATCH = {
    "pictures": np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8),
    "loss_weights": np.array([1, 1, 0], np.float32),
}
MODEL = Shifted(np.array([[1, 1, 2, 2], [3, 3, 3, 3], [7, 8, 9, 6]]), np.array([0.1, 0.3, 5.0], np.float32))


def test_error_is_of_real_pictures_alone():
    loss, metrics = Reconstruction(quantizer_weight=2.0)(MODEL, BATCH, jax.random.key(0))
    values = {name: float(mean.value()) for name, mean in metrics.items()}
    assert float(loss.weight) == 8  # ids of two pictures
    assert values["loss"] == pytest.approx((0.01 + 0.09) / 2, rel=1e-4)
    assert float(loss.value()) == pytest.approx(values["loss"] + 2 * 0.5, rel=1e-4)
    assert values["psnr"] == pytest.approx(np.mean([10 * np.log10(4 / e) for e in (0.01, 0.09)]), rel=1e-4)
    p = np.array([2, 2, 4]) / 8
    assert values["perplexity"] == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-5)
    assert values["codes_used"] == 3
    absolute = Reconstruction(error="absolute")(MODEL, BATCH, None)[1]["loss"]
    assert float(absolute.value()) == pytest.approx(0.2, rel=1e-4)


def test_books_are_averaged():
    ids = jnp.stack([jnp.zeros((1, 4), int), jnp.arange(4)[None]], -1)
    perplexity, used = code_statistics(ids, jnp.array([True]), 5)
    assert float(perplexity) == pytest.approx((1 + 4) / 2) and float(used) == 2.5


def test_pixels():
    np.testing.assert_allclose(to_pixels(jnp.array([0, 255], jnp.uint8)), [-1, 1])


def test_refuses():
    with pytest.raises(UserError, match=r"Reconstruction\.error"):
        Reconstruction(error="cubed")
    with pytest.raises(UserError, match="quantizer_weight"):
        Reconstruction(quantizer_weight=-1.0)
