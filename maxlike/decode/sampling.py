"""How the next token is chosen from the logits; every knob is an array over rows, so no value compiles anything anew.

The order is that of `transformers`: penalties, temperature, top-k, top-p, min-p. Other engines order the last three
differently.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request draws its tokens.

    temperature >= 0: logits are divided by it; 0 takes the most probable token (the lowest id of equals).
    top_k >= 0: only tokens at least as probable as the k-th (equals of the k-th stay); 0: all.
    top_p in (0, 1]: of what top_k left, the smallest set of most probable tokens that holds this much probability
        (Holtzman et al. 2019, arXiv 1904.09751); 1: all.
    min_p in [0, 1): only tokens at least this probable relative to the most probable one (arXiv 2407.01082); 0: all.
    repetition_penalty > 0: a positive logit of a token that the prompt or the continuation has is divided by it, a
        negative one multiplied (Keskar et al. 2019, arXiv 1909.05858); 1: none.
    presence_penalty, frequency_penalty: subtracted from the logit of a token once it has been generated, and once for
        each time; prompts do not count; 0: none.
    seed >= 0: of this request's noise. The same model, prompt and seed give the same tokens in any batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self):
        refused = (
            (not (self.temperature >= 0 and math.isfinite(self.temperature)), "temperature", "give 0 or more"),
            (self.top_k < 0, "top_k", "give a number of tokens, or 0 for all"),
            (not 0 < self.top_p <= 1, "top_p", "it lies above 0 and at most at 1; 1 keeps all"),
            (not 0 <= self.min_p < 1, "min_p", "it lies from 0 to below 1; 0 keeps all"),
            (
                not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)),
                "repetition_penalty",
                "give more than 0; 1 is none",
            ),
            (not math.isfinite(self.presence_penalty), "presence_penalty", "give a finite number; 0 is none"),
            (not math.isfinite(self.frequency_penalty), "frequency_penalty", "give a finite number; 0 is none"),
            (not 0 <= self.seed < 2**31, "seed", "give a whole number from 0 to 2^31 - 1"),
        )
        for wrong, knob, fix in refused:
            if wrong:
                raise UserError(f"Sampling.{knob}={getattr(self, knob)}: {fix}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[field.name for field in dataclasses.fields(Sampling)],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The knobs of `Sampling` as arrays [B], one entry a row: float32, but top_k and seed int32."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, requests: Sequence[Sampling]) -> "SamplingRows":
        """Numpy arrays of the requests' knobs."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        dtypes = {name: np.int32 if name in ("top_k", "seed") else np.float32 for name in names}
        return cls(**{name: np.array([getattr(r, name) for r in requests], dtypes[name]) for name in names})


def penalise(logits_BV: jax.Array, prompt_BV: jax.Array, counts_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits after the three penalties. prompt_BV: whether the prompt has a token; counts_BV: how often it was made."""
    repetition_B1 = rows.repetition_penalty[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(prompt_BV | (counts_BV > 0), repeated_BV, logits_BV)
    logits_BV -= rows.presence_penalty[:, None] * (counts_BV > 0)
    return logits_BV - rows.frequency_penalty[:, None] * counts_BV


def rank(logits_BV: jax.Array, rows: SamplingRows) -> tuple[jax.Array, jax.Array]:
    """(ranked_BV, order_BV): log-probabilities after temperature and filters, most probable first, -inf where
    filtered out; and the token of each rank. One stable descending sort serves all filters. Temperature 0 counts as 1.
    """
    B, V = logits_BV.shape
    temperature_B1 = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    token_BV = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V))
    negative_BV, order_BV = jax.lax.sort((-logits_BV / temperature_B1, token_BV), num_keys=1, is_stable=True)
    x_BV = -negative_BV
    k_B1 = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, V), V)[:, None]
    x_BV = jnp.where(x_BV >= jnp.take_along_axis(x_BV, k_B1 - 1, 1), x_BV, -jnp.inf)
    p_BV = jax.nn.softmax(x_BV, -1)
    before_BV = jnp.cumsum(p_BV, -1) - p_BV  # probability of all better tokens
    top_p_B1 = rows.top_p[:, None]
    kept_BV = (before_BV < top_p_B1) | (top_p_B1 >= 1)  # rounding must not cut the tail where nothing is asked
    kept_BV &= p_BV >= rows.min_p[:, None] * p_BV[:, :1]
    kept_BV |= jnp.arange(V) == 0
    return jax.nn.log_softmax(jnp.where(kept_BV, x_BV, -jnp.inf), -1), order_BV


def draw(
    logits_BV: jax.Array, rows: SamplingRows, positions_B: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Token of each row, int32 [B], and its log-probability under the distribution it was drawn from.

    logits_BV: float32, after penalties. positions_B: the place in its row that the token will take; the noise of a row
    comes from (key, its seed, its position) alone, whatever shares the batch. Rows of temperature 0 take the best token
    with log-probability 0; where all rows do, nothing is sorted.
    """
    best_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)

    def greedy():
        return best_B, jnp.zeros(best_B.shape, jnp.float32)

    def sampled():
        ranked_BV, order_BV = rank(logits_BV, rows)
        # Noise belongs to tokens, not to ranks: a rounding difference that swaps two ranks then changes nothing.
        noise_BV = jnp.take_along_axis(_gumbel(key, rows.seed, positions_B, logits_BV.shape[1]), order_BV, 1)
        chosen_B1 = jnp.argmax(ranked_BV + noise_BV, -1)[:, None]
        token_B = jnp.take_along_axis(order_BV, chosen_B1, 1)[:, 0]
        logprob_B = jnp.take_along_axis(ranked_BV, chosen_B1, 1)[:, 0]
        cold_B = rows.temperature == 0
        return jnp.where(cold_B, best_B, token_B), jnp.where(cold_B, 0.0, logprob_B)

    return jax.lax.cond(jnp.any(rows.temperature > 0), sampled, greedy)


def _gumbel(key: jax.Array, seed_B: jax.Array, positions_B: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise [B, V]: the argmax of log-probabilities plus it is a draw from them."""

    def one(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, seed), position), (vocab,))

    return jax.vmap(one)(seed_B, positions_B)
