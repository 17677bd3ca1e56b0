"""Two sets of parameters are the same model where they give the same logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.context import Context, Source
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from layers.multi_token import shift

LENGTH, ROWS = 32, 2


def probe(network: Any) -> np.ndarray:
    """Token ids [2, 32] that any model of this vocabulary takes: the same in every run."""
    positions = network.embed.positions
    length = LENGTH if positions is None else min(LENGTH, positions.shape[0])
    return np.random.default_rng(0).integers(0, network.vocab, (ROWS, length), np.int32)


def logits(graph: Any, params: dict, buffers: dict, tokens_BT: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of parameters taken to float32, without the padding of the vocabulary. Behind them,
    along B, those of each module that predicts further ahead (LanguageModel.mtp)."""

    def run(params: dict, buffers: dict, tokens_BT: jax.Array) -> jax.Array:
        model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.float32), params), buffers)
        source = Source.of(tokens_BT) if isinstance(model, EncoderDecoder) else None
        hidden = [model(tokens_BT, Context.of(tokens_BT, source=source)).hidden_BTD]
        if isinstance(model, LanguageModel) and model.mtp is not None:
            ctx = model.context(tokens_BT, Context.of(tokens_BT))
            hidden += [made for made, _ in model.mtp(hidden[0], shift(tokens_BT, 1), model.embed, ctx)]
        return jnp.concatenate([model.logits(hidden_BTD) for hidden_BTD in hidden])[..., : model.vocab]

    return np.asarray(jax.jit(run)(params, buffers, tokens_BT))
