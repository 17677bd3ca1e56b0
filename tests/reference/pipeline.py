"""What a pipeline computes, one micro-batch after another through the whole stack; small layers that show all of it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import axes


class Mixing(nnx.Module):
    """The sum of what a token sees of its segment, times a matrix."""

    def __init__(self, dim, *, rngs):
        self.w = axes.param(rngs, (dim, dim), ("embed", "embed_out"))

    def __call__(self, x_BTD, ctx):
        position_T = jnp.arange(x_BTD.shape[1])
        sees_BTS = (ctx.segments_BT[:, :, None] == ctx.segments_BT[:, None]) & (position_T[:, None] >= position_T)
        return 0.3 * jnp.einsum("bts,bsd->btd", sees_BTS.astype(x_BTD.dtype), x_BTD) @ self.w[...], {}


class Counting(nnx.Module):
    """A feed-forward that reads its layer's index and the key, and reports a loss, a metric and a statistic of the
    batch."""

    def __init__(self, dim, *, rngs):
        self.up = axes.param(rngs, (dim, 2 * dim), ("embed", "mlp"))
        self.down = axes.param(rngs, (2 * dim, dim), ("mlp", "embed"))
        self.count = axes.buffer(jnp.zeros(2 * dim), ("mlp",))

    def __call__(self, x_BTD, ctx):
        noise = jax.random.normal(ctx.key, (), x_BTD.dtype)
        h_BTF = x_BTD @ self.up[...] + 0.1 * ctx.layer.astype(x_BTD.dtype) + noise
        counts_F = jnp.sum(h_BTF > 0, (0, 1))
        loss = 0.1 * jnp.mean(jnp.square(h_BTF.astype(jnp.float32)))
        y_BTD = axes.measure(jnp.tanh(h_BTF) @ self.down[...], self.count[...], counts_F)
        return y_BTD, {"loss": loss, "layer": ctx.layer}


def micro_batches(B: int, stages: int, micro: int) -> np.ndarray:
    """[M, B / M]: rows of each micro-batch, where the batch is cut by stages first."""
    order = np.arange(B).reshape(stages, -1).T.reshape(-1)
    return order.reshape(-1, micro).T


def sequential(make_stack, x_BTD, ctx, rows_MB):
    """(y_BTD, aux averaged over the micro-batches). The stack is made for each, so that gradients are summed in the
    dtype of what it is made from."""
    shared, M = ctx.replace(key=None), len(rows_MB)
    keys = None if ctx.key is None else jax.random.split(ctx.key, M) if M > 1 else ctx.key[None]

    def one(rows_and_key):
        rows, key = rows_and_key
        part = jax.tree.map(lambda leaf: leaf[rows] if leaf.shape[0] == len(x_BTD) else leaf, shared)
        return make_stack()(x_BTD[rows], part.replace(key=key))

    y_MBTD, aux = jax.lax.map(one, (rows_MB, keys))
    y_BTD = jnp.zeros_like(x_BTD).at[rows_MB.reshape(-1)].set(y_MBTD.reshape(x_BTD.shape))
    return y_BTD, jax.tree.map(lambda values: jnp.mean(values, 0), aux)
