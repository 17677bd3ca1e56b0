"""The decoding loop: a batch of prompts and their continuations as one program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from layers.language_model import LanguageModel
from layers.stack import unroll
from maxlike.decode.sampling import SamplingRows, draw, penalise

NO_TOKEN = -1  # fills the output past a row's end


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_BN", "counts_B", "logprobs_BN", "sampling_logprobs_BN", "stopped_B"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of a batch.

    tokens_BN: int32, the first counts_B of each row real, a stop token included; -1 after them.
    logprobs_BN: log-probability of each token under the model, before penalties, temperature and filters.
    sampling_logprobs_BN: under the distribution it was drawn from (0 at temperature 0). Both 0 past the end.
    stopped_B: whether a stop token ended the row, rather than its limit.
    """

    tokens_BN: jax.Array
    counts_B: jax.Array
    logprobs_BN: jax.Array
    sampling_logprobs_BN: jax.Array
    stopped_B: jax.Array


def generate(
    model: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    sampling: SamplingRows,
    limits_B: jax.Array,
    stop_S: jax.Array,
    key: jax.Array,
    *,
    max_new: int,
    cache_dtype: jnp.dtype = jnp.float32,
) -> Generated:
    """Continues each row by at most min(limits_B, max_new) tokens, or through its first token of `stop_S`. Traceable.

    model: a network with `init_cache`, `extend` and `logits`. tokens_BT: prompts, padded on the right; the first
    lengths_B >= 1 are real. stop_S: ids that end a row; -1 matches none. max_new is the room that is compiled in;
    limits_B, like every knob of sampling, is data. A row's tokens do not depend on the rest of the batch: finished rows
    and padding write nothing, and noise comes from the request's seed.
    """
    B, T = tokens_BT.shape
    model = unroll(model)
    cache = model.init_cache(B, T + max_new, cache_dtype)
    # The loop begins with the hidden state of the last prompt token. So no position of the prompt is ever projected to
    # the vocabulary but the one that is needed, and there is one copy of the head and the sampler.
    hidden_B1D, cache = _read_prompt(model, tokens_BT, lengths_B, cache)
    vocab = jax.eval_shape(model.logits, hidden_B1D).shape[-1]
    row_B1 = jnp.arange(B)[:, None]
    known_BT = jnp.where(jnp.arange(T) < lengths_B[:, None], tokens_BT, vocab)
    prompt_BV = jnp.zeros((B, vocab), bool).at[row_B1, known_BT].set(True, mode="drop")
    limits_B = jnp.minimum(limits_B, max_new)

    def unfinished(state):
        return jnp.any(~state["done_B"])

    def advance(state):
        live_B, n, out = ~state["done_B"], state["n"], state["out"]
        logits_BV = model.logits(state["hidden_B1D"])[:, 0]
        token_B, drawn_B = draw(
            penalise(logits_BV, prompt_BV, state["counts_BV"], sampling), sampling, lengths_B + n, key
        )
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV, -1), token_B[:, None], 1)[:, 0]
        stopped_B = live_B & jnp.any(token_B[:, None] == stop_S, -1)
        done_B = state["done_B"] | stopped_B | (n + 1 >= limits_B)
        hidden_B1D, cache = model.extend(token_B[:, None], state["cache"], (~done_B).astype(jnp.int32))
        return {
            "n": n + 1,
            "hidden_B1D": hidden_B1D,
            "cache": cache,
            "counts_BV": state["counts_BV"].at[jnp.arange(B), token_B].add(live_B.astype(jnp.int32)),
            "done_B": done_B,
            "out": Generated(
                tokens_BN=out.tokens_BN.at[:, n].set(jnp.where(live_B, token_B, NO_TOKEN)),
                counts_B=out.counts_B + live_B,
                logprobs_BN=out.logprobs_BN.at[:, n].set(jnp.where(live_B, logprob_B, 0.0)),
                sampling_logprobs_BN=out.sampling_logprobs_BN.at[:, n].set(jnp.where(live_B, drawn_B, 0.0)),
                stopped_B=out.stopped_B | stopped_B,
            ),
        }

    state = {
        "n": jnp.zeros((), jnp.int32),
        "hidden_B1D": hidden_B1D,
        "cache": cache,
        "counts_BV": jnp.zeros((B, vocab), jnp.int32),
        "done_B": limits_B <= 0,
        "out": Generated(
            tokens_BN=jnp.full((B, max_new), NO_TOKEN, jnp.int32),
            counts_B=jnp.zeros(B, jnp.int32),
            logprobs_BN=jnp.zeros((B, max_new), jnp.float32),
            sampling_logprobs_BN=jnp.zeros((B, max_new), jnp.float32),
            stopped_B=jnp.zeros(B, bool),
        ),
    }
    return jax.lax.while_loop(unfinished, advance, state)["out"]


def _read_prompt(model: Any, tokens_BT, lengths_B, cache) -> tuple[jax.Array, Any]:
    """(hidden state of the last prompt token, cache with the prompt in it). A prompt goes in whole, for it may be a
    prefix; only the token that opens a blank is no part of what comes before it."""
    last_B1 = lengths_B[:, None] - 1
    if isinstance(model, LanguageModel) and model.prompt == "blank":
        _, cache = model.extend(tokens_BT, cache, lengths_B - 1)
        return model.extend(jnp.take_along_axis(tokens_BT, last_B1, 1), cache)
    hidden_BTD, cache = model.extend(tokens_BT, cache, lengths_B)
    return jnp.take_along_axis(hidden_BTD, last_B1[..., None], 1), cache
