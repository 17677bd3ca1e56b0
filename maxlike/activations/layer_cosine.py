"""How little a layer changes the residual stream: what depth upscaling repeats."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.activations.statistic import Seen, Statistic, Sums, Values, by_layer, layered


class LayerCosine(Statistic):
    """Cosine between the residual stream before and after each block (Yi, arXiv 2403.04652, depth upscaling): the
    closer to 1, the less the layer does and the less harm it is to have it twice. `maxlike.deepen.Deepen` reads
    them.

    rows: of the validation split. Values: layer_cosine/each, a number a block, shallow first, the mean over tokens but
    for the first of each row and of each document, whose huge values would hide the others; layer_cosine, its mean
    over blocks.
    """

    taps = ("residual",)

    def sums(self, seen: Seen) -> Sums:
        states = [x_BTD.astype(jnp.float32) for x_BTD, _ in seen.tapped["residual"]]
        length = seen.real_BT.shape[1]
        later_BT = seen.real_BT & (seen.batch["positions"] > 0) & (jnp.arange(length) > 0)
        found = [seen.mean_where(_cosine(x, y), later_BT) for x, y in itertools.pairwise(states)]
        return {"cosine": by_layer(found)}

    def values(self, totals: dict[str, np.ndarray]) -> Values:
        return layered("layer_cosine", totals["cosine"])


def _cosine(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """[B, T]; 0 where one of the two is all zeros."""
    sizes = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1)
    return jnp.sum(x_BTD * y_BTD, -1) / jnp.maximum(sizes, 1e-30)
