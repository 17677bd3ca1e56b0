"""Reconstruction: an autoencoder of pictures learns to give back what it was given."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from maxlike.errors import UserError
from maxlike.metrics import Mean

PIXEL_RANGE = 2.0  # pixels are in [-1, 1]


class Reconstruction:
    """Mean error of the decoded pixels, plus the quantizer's own loss.

    Reads of the batch: pictures (uint8 [B, S, S, 3]), loss_weights (float32 [B], 0 masks a picture). The model:
    `model(pixels in [-1, 1], key)` gives pixels_BSSC, ids and aux (`layers.image_tokenizer.ImageTokenizer`).

    error: "squared" or "absolute" difference. quantizer_weight: of the quantizer's loss, >= 0.

    Metrics: loss (the error alone, of pixels in [-1, 1]), psnr (dB, mean over pictures), perplexity (exp of the entropy
    of the ids' histogram) and codes_used (distinct ids) over the ids of one micro-batch, for each book and averaged, so
    both are bounded by that number of ids; the quantizer's loss where it has one.
    Raises UserError for a knob outside its range.
    """

    def __init__(self, *, error: Literal["squared", "absolute"] = "squared", quantizer_weight: float = 1.0):
        if error not in ("squared", "absolute"):
            raise UserError(f"Reconstruction.error={error!r} must be 'squared' or 'absolute'")
        if not 0 <= quantizer_weight < math.inf:
            raise UserError(f"Reconstruction.quantizer_weight={quantizer_weight} must not be negative")
        self.error, self.quantizer_weight = error, quantizer_weight

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch, weighted by ids. key: randomness of a training call; None: evaluation."""
        pixels_BSSC = to_pixels(batch["pictures"])
        output = model(pixels_BSSC, key)
        difference = output.pixels_BSSC.astype(jnp.float32) - pixels_BSSC
        square_B = jnp.mean(jnp.square(difference), (1, 2, 3))
        error_B = square_B if self.error == "squared" else jnp.mean(jnp.abs(difference), (1, 2, 3))
        weights_B = batch["loss_weights"].astype(jnp.float32) * model.length
        weight = jnp.sum(weights_B)
        error = Mean(jnp.sum(error_B * weights_B), weight)
        psnr_B = -10.0 * jnp.log10(jnp.maximum(square_B, 1e-10) / PIXEL_RANGE**2)
        perplexity, used = code_statistics(output.ids, weights_B > 0, model.vocab)
        metrics = {
            "loss": error,
            "psnr": Mean(jnp.sum(psnr_B * weights_B), weight),
            "perplexity": Mean(perplexity * weight, weight),
            "codes_used": Mean(used * weight, weight),
        }
        total = error.total
        if "loss" in output.aux:
            total = total + self.quantizer_weight * output.aux["loss"] * weight
            metrics["quantizer_loss"] = Mean(output.aux["loss"] * weight, weight)
        return Mean(total, weight), jax.lax.stop_gradient(metrics)


def to_pixels(pictures_BSSC: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return pictures_BSSC.astype(jnp.float32) / 127.5 - 1.0


def code_statistics(ids: jax.Array, real_B: jax.Array, vocab: int) -> tuple[jax.Array, jax.Array]:
    """(perplexity, number of distinct ids) of ids [B, length] or [B, length, books], of real pictures alone; the mean
    over books."""
    books = ids.reshape(*ids.shape[:2], -1)
    one_BTM = jnp.broadcast_to(real_B[:, None, None].astype(jnp.float32), books.shape)
    counts_MV = jax.vmap(lambda i, n: jax.ops.segment_sum(n.ravel(), i.ravel(), num_segments=vocab), (2, 2))(
        books, one_BTM
    )
    p = counts_MV / jnp.maximum(jnp.sum(counts_MV, -1, keepdims=True), 1.0)
    entropy_M = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
    return jnp.mean(jnp.exp(entropy_M)), jnp.mean(jnp.sum((counts_MV > 0).astype(jnp.float32), -1))
