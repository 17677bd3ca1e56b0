"""Token embeddings and the output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.context import Context
from layers.linear import Linear


class Embed(nnx.Module):
    """x = scale * table[token] (+ position_table[position]).

    tokens_BT: int32 [B, T] below `vocab`; x: [B, T, D].

    Knobs: scale > 0 on the token vectors (sqrt(D) in Gemma); std > 0 of the initial table; positions >= 0, the number
    of learned absolute positions (GPT-2), 0 for none.
    Refuses a row longer than `positions`; a decoding position beyond them reads the last one, so the caller bounds it.
    """

    def __init__(
        self, vocab: int, dim: int, *, scale: float = 1.0, std: float = 0.02, positions: int = 0, rngs: nnx.Rngs
    ):
        if scale <= 0 or std <= 0:
            raise ValueError(f"Embed.scale={scale} and Embed.std={std} must be positive")
        if positions < 0:
            raise ValueError(f"Embed.positions={positions} must be 0 (none) or the longest length in tokens")
        self.scale = scale
        self.table = axes.param(rngs, (vocab, dim), ("vocab", "embed"), axes.normal(std))
        self.positions = (
            axes.param(rngs, (positions, dim), ("positions", "embed"), axes.normal(std)) if positions else None
        )

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        x_BTD = jnp.take(self.table[...], tokens_BT, axis=0, mode="clip")
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.positions is not None:
            if tokens_BT.shape[1] > self.positions.shape[0]:
                raise ValueError(
                    f"Embed.positions={self.positions.shape[0]} is less than the length {tokens_BT.shape[1]}: raise it"
                )
            x_BTD = x_BTD + jnp.take(self.positions[...], ctx.positions_BT, axis=0, mode="clip")
        return x_BTD


class Head(nnx.Module):
    """logits = soft_cap * tanh(scale * h W / soft_cap), float32.

    hidden_BTD: [B, T, D] after the final norm; table_VD: the embedding's table; logits: [B, T, V].

    Knobs: tied, W is the embedding's table transposed, else a matrix of its own; scale > 0 on the logits; soft_cap > 0
    (Gemma 2, arXiv 2408.00118), or None; std > 0 of an untied matrix, None for 1 / sqrt(D).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        tied: bool = True,
        scale: float = 1.0,
        soft_cap: float | None = None,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        if scale <= 0:
            raise ValueError(f"Head.scale={scale} must be positive")
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"Head.soft_cap={soft_cap} must be positive, or None for no cap")
        self.scale, self.soft_cap = scale, soft_cap
        self.linear = None if tied else Linear((dim,), (vocab,), ("embed",), ("vocab",), std=std, rngs=rngs)

    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        weight_DV = table_VD.T if self.linear is None else self.linear.kernel[...]
        logits_BTV = jnp.matmul(hidden_BTD, weight_DV, preferred_element_type=jnp.float32)
        if self.scale != 1.0:
            logits_BTV = logits_BTV * self.scale
        if self.soft_cap is not None:
            logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
        return logits_BTV
