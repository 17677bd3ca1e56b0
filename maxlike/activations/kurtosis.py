"""Excess kurtosis of the residual stream: how heavy the tails of its channels are."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.activations.statistic import Peak, Seen, Statistic, Sums, Values, by_layer, layered
from maxlike.errors import UserError


class Kurtosis(Statistic):
    """Excess kurtosis of hidden states over their channels (outlier-safe pre-training, arXiv 2506.19697).

    For each token vector x [D], float32, of each hidden state, which are the output of the embedding and of every
    block, the last one behind the final norm:

        k = max(mean(x^4) / std(x)^4 - 3, 0),    std centred with D - 1, the fourth moment not centred

    averaged over tokens and hidden states. Channels that carry outliers make it large; it never compares models of
    different width, for a Gaussian has sqrt(24 / D) / sqrt(2 pi) and not 0.

    rows: of the validation split (the paper: 128 of 2,048 tokens). context: "full" reads the states of whole rows, the
    definition one expects; "single_token" those of each token as a row of its own, at position 0 without context, which
    is what the paper's published script computes. The two never belong in one table, so they have different names.

    Values: kurtosis, kurtosis/each; kurtosis_centered (and /each), E(x - m)^4 / (E(x - m)^2)^2 - 3, not clipped;
    kurtosis_gaussian, the level above. With "single_token" the names begin with single_token_.
    """

    taps = ("residual",)

    def __init__(self, *, rows: int = 32, context: Literal["full", "single_token"] = "full"):
        super().__init__(rows=rows)
        if context not in ("full", "single_token"):
            raise UserError(f"Kurtosis.context={context!r} must be 'full' or 'single_token'")
        self.context = context

    def sums(self, seen: Seen) -> Sums:
        states = [*(x_BTD for x_BTD, _ in seen.tapped["residual"][:-1]), seen.hidden_BTD]
        return {
            "clipped": by_layer([seen.mean(jnp.maximum(excess(x_BTD), 0.0)) for x_BTD in states]),
            "centered": by_layer([seen.mean(centered_excess(x_BTD)) for x_BTD in states]),
            "width": Peak(jnp.float32(states[0].shape[-1])),
        }

    def values(self, totals: dict[str, np.ndarray]) -> Values:
        prefix = "" if self.context == "full" else "single_token_"
        found = layered(f"{prefix}kurtosis", totals["clipped"]) | layered(
            f"{prefix}kurtosis_centered", totals["centered"]
        )
        return found | {f"{prefix}kurtosis_gaussian": gaussian_level(float(totals["width"]))}


def excess(x_BTD: jax.Array) -> jax.Array:
    """mean(x^4) / std(x)^4 - 3 over the last axis, [B, T]: std centred, with D - 1. 0 for a constant vector."""
    x_BTD = x_BTD.astype(jnp.float32)
    return _ratio(jnp.mean(x_BTD**4, -1), jnp.var(x_BTD, -1, ddof=1))


def centered_excess(x_BTD: jax.Array) -> jax.Array:
    """The ordinary excess kurtosis over the last axis, [B, T]: of the centred vector, biased. 0 for a constant one."""
    x_BTD = x_BTD.astype(jnp.float32)
    x_BTD = x_BTD - jnp.mean(x_BTD, -1, keepdims=True)
    return _ratio(jnp.mean(x_BTD**4, -1), jnp.mean(x_BTD**2, -1))


def _ratio(fourth: jax.Array, variance: jax.Array) -> jax.Array:
    spread = variance > 0
    return jnp.where(spread, fourth / jnp.where(spread, variance, 1.0) ** 2 - 3.0, 0.0)


def gaussian_level(width: float) -> float:
    """What clipped excess kurtosis a Gaussian vector of `width` channels has on average; too high below 512."""
    return math.sqrt(24 / width) / math.sqrt(2 * math.pi)
