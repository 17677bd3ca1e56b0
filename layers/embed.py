"""Token embeddings and the output heads."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels
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

    tieable = True  # the table alone says what a token enters as, so a tied head may read it

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
        x_BTD = lookup(self.weights(), tokens_BT)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.positions is not None:
            if tokens_BT.shape[1] > self.positions.shape[0]:
                raise ValueError(
                    f"Embed.positions={self.positions.shape[0]} is less than the length {tokens_BT.shape[1]}: raise it"
                )
            x_BTD = x_BTD + jnp.take(self.positions[...], ctx.positions_BT, axis=0, mode="clip")
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def flops_per_token(self) -> float:
        """No matrix product: a lookup."""
        return 0.0


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """table[token], [B, T, D]; an id outside the table reads its nearest row.

    On a mesh the table stays where it lies. A device looks up the ids of its rows of the table, for the tokens of all
    devices that hold other columns of them; a sum over the rows' devices and an exchange of columns for tokens leave it
    with whole vectors of its share of the residual stream. So tokens travel, not the vocabulary.
    Refuses T that does not divide over the devices of the residual stream.
    """
    rows, columns, batch = (axes.mesh_axes(name) for name in ("vocab", "embed", "batch"))
    spread, length = axes.mesh_axes("residual_length"), axes.mesh_axes("length")
    if not rows and not columns:
        return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
    if not {*columns} <= {*batch} or spread not in (length, length + rows):
        kernels.take("embedding", "compiler", f"a table on {rows} x {columns} is not cut as the tokens on {batch} are")
        return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
    kernels.take("embedding", "exchange", f"the table stays on its devices: ids on {rows}, width on {columns}")
    if tokens_BT.shape[1] % axes.shards("residual_length"):
        raise ValueError(
            f"rows of {tokens_BT.shape[1]} tokens (Experiment.sequence_length) do not divide over the "
            f"{axes.shards('residual_length')} devices of the mesh axes {', '.join(spread)}: change it or Mesh.shape"
        )
    V = table_VD.shape[0]

    def local(table_VD, tokens_BT):
        ids_BT = jnp.clip(tokens_BT, 0, V - 1)
        if columns:
            ids_BT = jax.lax.all_gather(ids_BT, columns, axis=0, tiled=True)
        if rows:
            ids_BT = ids_BT - jax.lax.axis_index(rows) * table_VD.shape[0]
        x_BTD = jnp.take(table_VD, ids_BT, axis=0, mode="clip")
        if rows:
            here_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
            x_BTD = jnp.where(here_BT[..., None], x_BTD, 0)
            if spread == length:
                x_BTD = jax.lax.psum(x_BTD, rows)
            else:
                x_BTD = jax.lax.psum_scatter(x_BTD, rows, scatter_dimension=1, tiled=True)
        return jax.lax.all_to_all(x_BTD, columns, 0, 2, tiled=True) if columns else x_BTD

    over = tuple(dict.fromkeys(batch + length + rows + columns))
    inputs, outputs = (("vocab", "embed"), ("batch", "length")), ("batch", "residual_length", None)
    return axes.shard_map(local, over=over, inputs=inputs, outputs=outputs)(table_VD, tokens_BT)


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

    @property
    def tied(self) -> bool:
        """Whether W is the embedding's table."""
        return self.linear is None

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

    @property
    def tied(self) -> bool:
        """Whether the logits' matrix is the embedding's table."""
        return self.head.tied

    def __call__(self, hidden_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        return self.head(self.norm(ACTIVATIONS[self.activation](self.dense(hidden_BTD))), table_VD)

    def flops_per_token(self, vocab: int) -> float:
        """Of `vocab` logits, padding not counted."""
        return self.dense.flops_per_token() + self.head.flops_per_token(vocab)


def refuse_tied(embed: nnx.Module, head: nnx.Module) -> None:
    """Raises ValueError for a tied head whose embedding's table is not all that a token enters by."""
    if head.tied and not embed.tieable:
        raise ValueError(
            f"Head.tied=True shares the table of {type(embed).__name__}, whose projection the head would leave out: "
            "set Head.tied = False"
        )
