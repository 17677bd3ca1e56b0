"""Mixture of depths: a block that only some tokens go through."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, selection
from layers.active import active_parameters
from layers.attention import Attention
from layers.auxiliary_router import agreement, router_product
from layers.block import Aux
from layers.context import Context, InOrder
from layers.parts import parts
from layers.relative_attention import RelativeAttention


class MixtureOfDepths(nnx.Module, InOrder):
    """out = x + r (block(x) - x) for the tokens that are kept, r = sigmoid(x . w); out = x for the others (Raposo et
    al. 2024, arXiv 2404.02258; with a sigmoid gate as in MoMa, arXiv 2407.21770, section 2.4).

    The share `capacity` of the tokens with the highest r is kept, whatever their modality (equal ones: the earlier).
    Kept tokens see only each other, in order and with their own positions. It stands in for a block in Stack.pattern:
    (@MixtureOfDepths, @Block) thins every second layer, beginning with the first. x and y: [B, T, D].

    Knobs:
        block: factory of the block.
        capacity in (0, 1].
        scope: "sequence" keeps floor(capacity n) of the n tokens of each row; "batch" that share of the whole batch.
        row_bound >= 1, for "batch": a row has room for row_bound * capacity * T tokens, the rest of its choices, lowest
            scores first, is dropped and counted in the metric "dropped". 1.0 for "sequence", which needs no more.
        auxiliary: factory of the auxiliary router, such as AuxiliaryRouter, or None.
        evaluation: "top_k" evaluates as it trains, which sees tokens to come; "auxiliary" as it decodes.
    Decoding keeps the tokens whose auxiliary router fires. Their number is not known before, so the block's cache has
    room for whole rows; it is filled without gaps by the kept tokens alone (Context.slots_BT).
    aux: the block's, and kept (share of the tokens), dropped, and where the auxiliary router is compared with the
    choice auxiliary_bce, auxiliary_accuracy, auxiliary_recall.
    Refuses a capacity outside (0, 1] or one that keeps no token of a row, attention windows and RelativeAttention (a
    distance among kept tokens is none in the row), contexts with a prefix or an encoder, and decoding without an
    auxiliary router.
    """

    def __init__(
        self,
        dim: int,
        *,
        block: Callable,
        capacity: float = 0.25,
        scope: Literal["sequence", "batch"] = "sequence",
        row_bound: float = 1.0,
        auxiliary: Callable | None = None,
        evaluation: Literal["top_k", "auxiliary"] = "top_k",
        rngs: nnx.Rngs,
    ):
        if not 0 < capacity <= 1:
            raise ValueError(f"MixtureOfDepths.capacity={capacity} is outside (0, 1]")
        if scope not in ("sequence", "batch") or evaluation not in ("top_k", "auxiliary"):
            raise ValueError(
                f"MixtureOfDepths.scope={scope!r} must be 'sequence' or 'batch', and evaluation={evaluation!r} "
                "'top_k' or 'auxiliary'"
            )
        if row_bound < 1 or (scope == "sequence" and row_bound != 1):
            raise ValueError(
                f"MixtureOfDepths.row_bound={row_bound} must be at least 1, and 1.0 where scope is 'sequence'"
            )
        if evaluation == "auxiliary" and auxiliary is None:
            raise ValueError(
                "MixtureOfDepths.evaluation='auxiliary' needs MixtureOfDepths.auxiliary, an AuxiliaryRouter"
            )
        self.capacity, self.scope, self.row_bound, self.evaluation = capacity, scope, row_bound, evaluation
        self.dim = dim
        self.block = block(dim, rngs=rngs)
        self.router = axes.param(rngs, (dim,), ("embed",), axes.normal(0.02), exact=True)
        self.auxiliary = None if auxiliary is None else auxiliary(dim, outputs=None, rngs=rngs)
        _refuse_distances(self.block)

    def _keep_best(self, logits_BT: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, int, jax.Array]:
        """(bool [B, T] of the kept tokens, room in a row, choices that found no room)."""
        B, T = logits_BT.shape
        slots = min(T, int(selection.share(T, min(1.0, self.row_bound * self.capacity))))
        if slots < 1:
            raise ValueError(
                f"MixtureOfDepths.capacity={self.capacity} keeps none of a row of {T} tokens: raise it or the length"
            )
        # Tokens are compared where all of them are: scores alone travel between devices.
        in_whole_rows = "batch" if self.scope == "sequence" else None
        scores_BT = axes.constrain(jnp.where(real_BT, logits_BT, -jnp.inf), in_whole_rows, None)
        if self.scope == "batch":
            wanted = selection.share(jnp.sum(real_BT), self.capacity)
            index, taken = selection.best(jnp.reshape(scores_BT, (-1,)), wanted, B * T)
            chosen_BT = jnp.reshape(selection.marked(index, taken, B * T), (B, T))
            scores_BT, wanted_B = jnp.where(chosen_BT, logits_BT, -jnp.inf), jnp.sum(chosen_BT, 1)
        else:
            wanted_B = selection.share(jnp.sum(real_BT, 1), self.capacity)
        scores_BT = axes.constrain(scores_BT, "batch", None)
        index_BC, taken_BC = selection.best(scores_BT, wanted_B, slots)
        keep_BT = selection.marked(index_BC, taken_BC, T)
        return keep_BT, slots, jnp.sum(wanted_B) - jnp.sum(keep_BT)

    def _through(self, x_BTD, gate_BT, index_BC, ctx: Context, run: Callable) -> tuple[jax.Array, Any]:
        """Takes the tokens at index_BC (T: nobody) through `run(h_BCD, ctx)` and puts them back."""
        if any(x is not None for x in (ctx.prefix_BT, ctx.blocks_BT, ctx.anchors_BT, ctx.source, ctx.bias_BHTS)):
            raise ValueError("MixtureOfDepths runs in a plain decoder: no prefix, blanks, encoder or position bias")
        if ctx.order_BT is not None:
            raise ValueError(
                "MixtureOfDepths needs the tokens of a row in order (Context.order_BT): set Mesh.balance = False"
            )
        T = x_BTD.shape[1]
        real_BC, at_BC = index_BC < T, jnp.minimum(index_BC, T - 1)

        # Row by row, so that rows on different devices stay there.
        def gathered(x_BT):
            return None if x_BT is None else jax.vmap(lambda x_T, at_C: x_T[at_C])(x_BT, at_BC)

        h_BCD = jnp.where(real_BC[..., None], gathered(x_BTD), 0)
        inner = ctx.replace(positions_BT=gathered(ctx.positions_BT), modality_BT=gathered(ctx.modality_BT))
        y_BCD, rest = run(h_BCD, inner, real_BC)
        change_BCD = gathered(gate_BT)[..., None] * (y_BCD - h_BCD).astype(jnp.float32)
        put_back = jax.vmap(lambda x_TD, index_C, change_CD: x_TD.at[index_C].add(change_CD, mode="drop"))
        return put_back(x_BTD, index_BC, change_BCD.astype(x_BTD.dtype)), rest

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        logits_BT, real_BT, T = router_product(x_BTD, self.router[...]), selection.real_tokens(ctx), x_BTD.shape[1]
        metrics = {}
        if self.evaluation == "auxiliary" and not ctx.train:
            keep_BT, slots, dropped, full = real_BT & (self.auxiliary(x_BTD) > 0), T, 0, False
        else:
            keep_BT, slots, dropped = self._keep_best(logits_BT, real_BT)
            # Room that stays empty is padding to the block; where none can, rows go on as whole documents, unmasked.
            full = ctx.segments_BT is None and self.scope == "sequence"
            if self.auxiliary is not None:
                metrics = agreement(self.auxiliary(x_BTD), keep_BT, real_BT)
        index_BC = selection.compact(keep_BT, slots)

        def run(h_BCD, inner, real_BC):
            if full:
                return self.block(h_BCD, inner)
            segments_BC = jnp.ones_like(index_BC)
            if ctx.segments_BT is not None:
                segments_BC = jnp.take_along_axis(ctx.segments_BT, jnp.minimum(index_BC, T - 1), 1)
            return self.block(h_BCD, inner.replace(segments_BT=jnp.where(real_BC, segments_BC, 0)))

        y_BTD, aux = self._through(x_BTD, jax.nn.sigmoid(logits_BT), index_BC, ctx, run)
        kept = jnp.sum(keep_BT)
        metrics |= {
            "kept": kept / jnp.maximum(jnp.sum(real_BT), 1),
            "dropped": dropped / jnp.maximum(kept + dropped, 1),
        }
        return y_BTD, aux | {f"depth/{name}": value for name, value in metrics.items()}

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The block's cache for rows of `length`, and how many tokens each row has kept so far."""
        if self.auxiliary is None:
            raise ValueError(
                "MixtureOfDepths.auxiliary is None: it keeps the best of a whole row, which decoding does not have; "
                "train auxiliary routers (objective AuxiliaryRouters) and decode with them"
            )
        return {"block": self.block.init_cache(batch, length, dtype), "kept_B": jnp.zeros(batch, jnp.int32)}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens a row, of which the first ctx.lengths_B are real; the kept ones enter the cache."""
        T = x_BTD.shape[1]
        keep_BT = selection.real_tokens(ctx) & (self.auxiliary(x_BTD) > 0)
        kept_B = jnp.sum(keep_BT, 1, dtype=jnp.int32)
        slots_BT = cache["kept_B"][:, None] + jnp.arange(T, dtype=jnp.int32)

        def run(h_BCD, inner, real_BC):
            return self.block.extend(h_BCD, cache["block"], inner.replace(lengths_B=kept_B, slots_BT=slots_BT))

        gate_BT = jax.nn.sigmoid(router_product(x_BTD, self.router[...]))
        y_BTD, block = self._through(x_BTD, gate_BT, selection.compact(keep_BT, T), ctx, run)
        return y_BTD, {"block": block, "kept_B": cache["kept_B"] + kept_B}

    def flops_per_token(self, length: int) -> float:
        """The block's share of the tokens, each among the kept ones alone, and the router."""
        return self.capacity * self.block.flops_per_token(max(1, int(self.capacity * length))) + 2.0 * self.dim

    def idle_parameters(self) -> float:
        """Those of the block that a token does not use, on average over kept and other tokens."""
        stored = sum(param.size for param in parts(self.block, nnx.Param))
        return stored - self.capacity * active_parameters(self.block)


def _refuse_distances(block: nnx.Module) -> None:
    for mixer in parts(block, (Attention, RelativeAttention)):
        if isinstance(mixer, RelativeAttention) or mixer.window is not None:
            what = "RelativeAttention" if isinstance(mixer, RelativeAttention) else f"Attention.window={mixer.window}"
            raise ValueError(
                f"MixtureOfDepths.block has {what}, which counts a distance that kept tokens do not have among "
                "themselves: use Attention with window None"
            )
