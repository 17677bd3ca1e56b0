"""Token embeddings and the output heads."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.context import Context
from layers.linear import Linear
from layers.mlp import ACTIVATIONS


class Embed(nnx.Module):
    """x = norm(scale * table[token] (+ position_table[position])).

    tokens_BT: int32 [B, T] below `vocab`; x: [B, T, D].

    Knobs: scale > 0 on the token vectors (sqrt(D) in Gemma); std > 0 of the initial table; positions >= 0, the number
    of learned absolute positions (GPT-2), 0 for none; norm: factory of a norm of the sum (ModernBERT), or None;
    gradient_scale in (0, 1]: the table learns by this share of its gradient, here and as a tied head (GLM-130B, arXiv
    2210.02414: 0.1, against loss spikes).
    Refuses a row longer than `positions`; a decoding position beyond them reads the last one, so the caller bounds it.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        scale: float = 1.0,
        std: float = 0.02,
        positions: int = 0,
        norm: Callable | None = None,
        gradient_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if scale <= 0 or std <= 0:
            raise ValueError(f"Embed.scale={scale} and Embed.std={std} must be positive")
        if positions < 0:
            raise ValueError(f"Embed.positions={positions} must be 0 (none) or the longest length in tokens")
        if not 0 < gradient_scale <= 1:
            raise ValueError(f"Embed.gradient_scale={gradient_scale} is outside (0, 1]: 1.0 leaves the gradient alone")
        self.scale, self.gradient_scale = scale, gradient_scale
        self.table = axes.param(rngs, (vocab, dim), ("vocab", "embed"), axes.normal(std))
        self.positions = (
            axes.param(rngs, (positions, dim), ("positions", "embed"), axes.normal(std)) if positions else None
        )
        self.norm = None if norm is None else norm(dim, rngs=rngs)

    def weights(self) -> jax.Array:
        """The table [V, D] as the model uses it, its gradient scaled."""
        table_VD = self.table[...]
        if self.gradient_scale == 1.0:
            return table_VD
        still_VD = jax.lax.stop_gradient(table_VD)
        return still_VD + self.gradient_scale * (table_VD - still_VD)

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        x_BTD = jnp.take(self.weights(), tokens_BT, axis=0, mode="clip")
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.positions is not None:
            if tokens_BT.shape[1] > self.positions.shape[0]:
                raise ValueError(
                    f"Embed.positions={self.positions.shape[0]} is less than the length {tokens_BT.shape[1]}: raise it"
                )
            x_BTD = x_BTD + jnp.take(self.positions[...], ctx.positions_BT, axis=0, mode="clip")
        return x_BTD if self.norm is None else self.norm(x_BTD)


class Head(nnx.Module):
    """logits = soft_cap * tanh((scale * h W + bias) / soft_cap), float32.

    hidden_BTD: [B, T, D] after the final norm; table_VD: the embedding's table; logits: [B, T, V].

    Knobs: tied, W is the embedding's table transposed, else a matrix of its own; scale > 0 on the products (D^-0.5 in
    T5's tied head); bias, a learned offset of each token's logit; soft_cap > 0 (Gemma 2, arXiv 2408.00118), or None;
    std > 0 of an untied matrix, None for 1 / sqrt(D).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        tied: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        soft_cap: float | None = None,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        if scale <= 0:
            raise ValueError(f"Head.scale={scale} must be positive")
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"Head.soft_cap={soft_cap} must be positive, or None for no cap")
        self.dim, self.scale, self.soft_cap = dim, scale, soft_cap
        self.linear = None if tied else Linear((dim,), (vocab,), ("embed",), ("vocab",), std=std, rngs=rngs)
        self.bias = axes.param(rngs, (vocab,), ("vocab",), jax.nn.initializers.zeros) if bias else None

    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        weight_DV = table_VD.T if self.linear is None else self.linear.kernel[...]
        logits_BTV = jnp.matmul(hidden_BTD, weight_DV, preferred_element_type=jnp.float32)
        if self.scale != 1.0:
            logits_BTV = logits_BTV * self.scale
        if self.bias is not None:
            logits_BTV = logits_BTV + self.bias[...].astype(jnp.float32)
        if self.soft_cap is not None:
            logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
        return logits_BTV

    def flops_per_token(self, vocab: int) -> float:
        """Of `vocab` logits, padding not counted."""
        return 2.0 * self.dim * vocab


class PredictionHead(nnx.Module):
    """head(norm(activation(h W))): the head of masked language models (BERT, arXiv 1810.04805; ModernBERT, arXiv
    2412.13663).

    hidden_BTD, table_VD and logits as of Head.

    Knobs: norm: factory; activation; bias, an offset on h W; head: factory of what makes the logits.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        norm: Callable,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "gelu",
        bias: bool = False,
        head: Callable = Head,
        rngs: nnx.Rngs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"PredictionHead.activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.dense = Linear((dim,), (dim,), ("embed",), ("embed_out",), bias=bias, rngs=rngs)
        self.norm = norm(dim, rngs=rngs)
        self.head = head(vocab, dim, rngs=rngs)

    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        return self.head(self.norm(ACTIVATIONS[self.activation](self.dense(hidden_BTD))), table_VD)

    def flops_per_token(self, vocab: int) -> float:
        """Of `vocab` logits, padding not counted."""
        return self.dense.flops_per_token() + self.head.flops_per_token(vocab)
