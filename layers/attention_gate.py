"""A learned gate inside attention: on its output, values, keys, queries, or after the output projection."""

import warnings
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, taps
from layers.context import Context
from layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
    "identity": lambda x: x,
}
POSITIONS = ("g1", "g2", "g3", "g4", "g5")


class AttentionGate(nnx.Module):
    """Y <- Y * activation(x W) or Y + activation(x W) (gated attention, arXiv 2505.06708, section 2.2).

    x [B, T, D] is the normed input of the attention layer, the same that makes queries, keys and values. What Y is:

        g1   output of the softmax, before the output projection   [B, T, H, K]    the paper's choice
        g2   values                                                [B, T, G, K]
        g3   keys                                                  [B, T, G, K]
        g4   queries                                               [B, T, H, K]
        g5   output of the output projection                       [B, T, D]

    Keys and queries are gated after their norm and before rotation, which would mix the numbers of a pair (the paper
    does not say where). Gates of values and keys come from the token that they belong to, so a cache holds them gated;
    the others come from the current token, and decoding keeps nothing for them.

    Built by an attention layer, which gives dim, heads H, kv_heads G and head_dim K.

    Knobs:
        position. granularity: "elementwise", a gate for each number, or "headwise", one for each head. head_shared:
        gates of the heads, after the activation, are averaged into one for all heads (each head keeps its weights).
        mode: "mul" or "add" (with SiLU in the paper). activation: "ns_sigmoid" is 0.5 + 0.5 sigmoid. It is computed in
        float32. input_dependent: False for learned logits instead of x W, from zero. bias: an offset on x W; off,
        except where weights come from a model that has it.
    Refuses a headwise or head-shared g5, which has no heads, gates that are both headwise and head-shared, and a bias
        on gates that do not depend on the input. Warns of a sigmoid that is added, for it can only add.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        position: Literal["g1", "g2", "g3", "g4", "g5"] = "g1",
        granularity: Literal["elementwise", "headwise"] = "elementwise",
        head_shared: bool = False,
        mode: Literal["mul", "add"] = "mul",
        activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid",
        input_dependent: bool = True,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        choices = {
            "position": (position, POSITIONS),
            "granularity": (granularity, ("elementwise", "headwise")),
            "mode": (mode, ("mul", "add")),
            "activation": (activation, tuple(ACTIVATIONS)),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"AttentionGate.{name}={value!r} must be one of {', '.join(known)}")
        if position == "g5" and (granularity == "headwise" or head_shared):
            wrong = "granularity='headwise'" if granularity == "headwise" else "head_shared=True"
            raise ValueError(f"AttentionGate.{wrong} with position='g5' has no heads to gate: use position='g1'")
        if granularity == "headwise" and head_shared:
            raise ValueError("AttentionGate.head_shared=True with granularity='headwise' leaves one number: use one")
        if bias and not input_dependent:
            raise ValueError("AttentionGate.bias=True needs input_dependent=True: learned logits are a bias already")
        if mode == "add" and activation in ("sigmoid", "ns_sigmoid"):
            warnings.warn(
                f"AttentionGate.mode='add' with activation={activation!r} can only add; the paper adds SiLU",
                stacklevel=2,
            )
        self.position, self.headwise, self.head_shared = position, granularity == "headwise", head_shared
        self.mode, self.activation = mode, activation
        if position == "g5":
            shape, names = (dim,), ("embed_out",)
        elif position in ("g2", "g3"):
            shape, names = (kv_heads, head_dim), ("kv_heads", "head_dim")
        else:
            shape, names = (heads, head_dim), ("heads", "head_dim")
        if self.headwise:
            shape, names = shape[:1], names[:1]
        self.logits = None if input_dependent else axes.param(rngs, shape, names, jax.nn.initializers.zeros)
        self.linear = Linear((dim,), shape, ("embed",), names, bias=bias, rngs=rngs) if input_dependent else None

    def score(self, x_BTD: jax.Array) -> jax.Array:
        """activation(x W) in the dtype of x, in a shape that spreads over Y: [B or 1, T or 1, heads or 1, K or 1], or
        [B or 1, T or 1, D] for g5."""
        z = self.logits[...][None, None] if self.linear is None else self.linear(x_BTD)
        if self.headwise:
            z = z[..., None]
        score = ACTIVATIONS[self.activation](z.astype(jnp.float32))
        if self.head_shared:
            score = jnp.mean(score, 2, keepdims=True)
        return taps.tap("gate", score.astype(x_BTD.dtype), self)

    def combine(self, y: jax.Array, score: jax.Array) -> jax.Array:
        return y * score if self.mode == "mul" else y + score

    def metrics(self, score: jax.Array, ctx: Context) -> dict[str, jax.Array]:
        """Scalars over the real tokens: mean gate, and the shares of gates below 0.1 and below 0.5."""
        score = jax.lax.stop_gradient(score).astype(jnp.float32)
        weight = jnp.ones((1, 1)) if ctx.segments_BT is None else (ctx.segments_BT != 0).astype(jnp.float32)
        weight = jnp.broadcast_to(weight, ctx.positions_BT.shape)

        def mean(x):
            x_BT = jnp.mean(x, tuple(range(2, x.ndim)))
            return jnp.sum(x_BT * weight) / jnp.maximum(jnp.sum(weight), 1.0)

        below = {f"gate_below_{limit}": mean((score < limit).astype(jnp.float32)) for limit in (0.1, 0.5)}
        return {"gate_mean": mean(score)} | below

    def flops_per_token(self) -> float:
        return 0.0 if self.linear is None else self.linear.flops_per_token()


def gated(gate: AttentionGate | None, position: str, y: jax.Array, score: jax.Array | None) -> jax.Array:
    """y under the gate where it has one at this position, else y."""
    return y if gate is None or gate.position != position else gate.combine(y, score)
