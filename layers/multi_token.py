"""Multi-token prediction: modules behind a language model that predict further ahead than the next token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.block import Aux
from layers.context import Context, InOrder
from layers.linear import Linear


class MultiTokenModule(nnx.Module):
    """norm(block(W [e ; h])): one step ahead (DeepSeek-V3, arXiv 2412.19437, section 2.2; LongCat-Flash, arXiv
    2509.01322).

    hidden_BTD [B, T, D]: what the step before it gives the head, for a prediction of token t + n; embedded_BTD: token
    t + n embedded; y [B, T, D] gives the head a prediction of token t + n + 1. e and h are the two, each behind a norm
    of its own; W is [2 D, D].

    Knobs: block, norm: factories.
    """

    def __init__(self, dim: int, *, block: Callable, norm: Callable, rngs: nnx.Rngs):
        self.embed_norm = norm(dim, rngs=rngs)
        self.hidden_norm = norm(dim, rngs=rngs)
        self.join = Linear((2 * dim,), (dim,), ("embed",), ("embed_out",), rngs=rngs)
        self.block = block(dim, rngs=rngs)
        self.norm = norm(dim, rngs=rngs)

    def __call__(self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        both = jnp.concatenate([self.embed_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], -1)
        y_BTD, aux = self.block(self.join(both), ctx)
        return self.norm(y_BTD), aux

    def flops_per_token(self, length: int) -> float:
        return self.join.flops_per_token() + self.block.flops_per_token(length)


class MultiToken(nnx.Module, InOrder):
    """`depth` modules in a chain; the n-th predicts token t + n + 1 and shares embedding and head with the model. Their
    blocks get no layer index.

    Knobs: depth >= 1; block: factory of the one block of each module; norm: factory of its three norms.
    Refuses depth < 1.
    """

    def __init__(self, dim: int, *, block: Callable, norm: Callable, depth: int = 1, rngs: nnx.Rngs):
        if depth < 1:
            raise ValueError(f"MultiToken.depth={depth} must be at least 1; without the part LanguageModel.mtp is None")
        self.steps = nnx.List([MultiTokenModule(dim, block=block, norm=norm, rngs=rngs) for _ in range(depth)])

    def __call__(
        self, hidden_BTD: jax.Array, following_BT: jax.Array, embed: Callable, ctx: Context
    ) -> list[tuple[jax.Array, Aux]]:
        """(hidden states for the head, aux) of each module.

        hidden_BTD: the model's, behind its final norm; following_BT: int32 [B, T], the token after each position;
        embed: the model's embedding; ctx: of the model's call. Module n reads token t + n, so its last n - 1 positions
        of a row are junk, as is what lies behind a document's end: the loss masks them.
        """
        if ctx.order_BT is not None:
            raise ValueError(
                "MultiToken needs the tokens of a row in order (Context.order_BT): set Mesh.balance = False"
            )
        out = []
        for depth, module in enumerate(self.steps):
            key = None if ctx.key is None else jax.random.fold_in(ctx.key, depth)
            embedded_BTD = axes.constrain(embed(shift(following_BT, depth), ctx), "batch", "length", "act_embed")
            hidden_BTD, aux = module(hidden_BTD, embedded_BTD, ctx.replace(key=key))
            out.append((hidden_BTD, aux))
        return out

    def flops_per_token(self, length: int, head: float) -> float:
        """head: FLOPs of the logits of a token, which each module makes anew."""
        return sum(module.flops_per_token(length) + head for module in self.steps)


def shift(x_BT: jax.Array, by: int) -> jax.Array:
    """x one earlier by `by` positions: y[t] = x[t + by], zeros behind the end."""
    return jnp.pad(x_BT[:, by:], ((0, 0), (0, by)))
