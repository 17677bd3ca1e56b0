"""Auxiliary routers: they predict from a token alone what a router that compares tokens has chosen."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


class AuxiliaryRouter(nnx.Module):
    """logits = SiLU(x A1) A2; a choice is made where sigmoid(logit) > 0.5, that is logit > 0 (MoMa, arXiv 2407.21770,
    section 2.5).

    Routing by the best tokens of a sequence or a batch looks at tokens to come, which a decoder does not have. So one
    of these learns that choice afterwards, the rest of the model frozen: see
    `maxlike.objectives.auxiliary_routers.AuxiliaryRouters` and `maxlike.optimizers.only.Only`. Its input is cut off
    from the gradient, so it never changes the model around it.

    x: [..., D]. logits: float32 [..., outputs], or [...] where outputs is None (keep a token or not).

    Knobs: width of the hidden layer >= 1, None for D / 2.
    """

    def __init__(self, dim: int, *, outputs: int | None, width: int | None = None, rngs: nnx.Rngs):
        if width is not None and width < 1:
            raise ValueError(f"AuxiliaryRouter.width={width} must be at least 1, or None for half the model's width")
        width = max(dim // 2, 1) if width is None else width
        self.up = axes.param(rngs, (dim, width), ("embed", "auxiliary"), axes.normal(dim**-0.5), exact=True)
        # One output is a vector, not a matrix of one column.
        shape, names = ((width,), ("auxiliary",)) if outputs is None else ((width, outputs), ("auxiliary", "routed"))
        self.out = axes.param(rngs, shape, names, axes.normal(width**-0.5), exact=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.silu(router_product(jax.lax.stop_gradient(x), self.up[...]))
        return router_product(h, self.out[...])


def router_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w in float32 whatever the compute dtype: rounded logits tie and flip choices."""
    return jnp.matmul(x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def agreement(logits: jax.Array, chosen: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """How well logits foretell the 0/1 assignment `chosen`, over the elements where `counted`, all of one shape.

    auxiliary_bce: mean binary cross-entropy (nats), the loss of an auxiliary router. auxiliary_accuracy: share foretold
    rightly. auxiliary_recall: share of the chosen that are foretold.
    """

    def mean(x, weight):
        return jnp.sum(jnp.where(weight, x, 0.0)) / jnp.maximum(jnp.sum(weight), 1)

    fires = logits > 0
    return {
        "auxiliary_bce": mean(jax.nn.softplus(logits) - jnp.where(chosen, logits, 0.0), counted),
        "auxiliary_accuracy": mean((fires == chosen).astype(jnp.float32), counted),
        "auxiliary_recall": mean(fires.astype(jnp.float32), counted & chosen),
    }
