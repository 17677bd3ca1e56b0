"""Attention sink: how much of the attention goes to the first token of a row."""

import jax
import jax.numpy as jnp
import numpy as np

from layers.attention import Attention
from layers.dual_chunk import DualChunk
from layers.masked_attention import MASKED
from layers.mla import MLA
from layers.parts import every_part
from layers.relative_attention import CrossAttention, RelativeAttention
from maxlike.activations.statistic import Peak, Seen, Statistic, Sums, Values, by_layer, layered
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.metrics import Mean

Mixer = Attention | MLA


class AttentionSink(Statistic):
    """Attention probability on the first token of a row (F-Attn of gated attention, arXiv 2505.06708): mean over heads,
    layers, and the later tokens of the row's first document that see it.

    Query 0 is left out, for which it is 1. Even attention without any preference gives about ln(T) / T, so the level
    of the same queries stands beside it. Rows are as training packs them: their first token is the first of a document
    only where the packing makes it so.

    rows: of the validation split. Values: attention_sink, attention_sink/each (a number for each softmax attention,
    shallow first), attention_sink_uniform (mean over the same queries of 1 / number of keys that they see),
    attention_sink_length (T, tokens).
    Refuses a network without softmax attention, one whose scores do not come from queries and keys alone
    (RelativeAttention, DualChunk), and mixture of depths.
    """

    taps = ("queries", "keys")
    inside_blocks = True

    def check(self, experiment: Experiment) -> None:
        super().check(experiment)
        network = experiment.bare()
        strange = every_part(network, (DualChunk, RelativeAttention, CrossAttention))
        if strange:
            raise UserError(
                f"AttentionSink does not know the scores of {type(strange[0]).__name__}: leave it out of Measure.tools"
            )
        if not every_part(network, Mixer):
            raise UserError("AttentionSink finds no softmax attention in the network: leave it out of Measure.tools")

    def sums(self, seen: Seen) -> Sums:
        queries, keys = (seen.tapped[name] for name in self.taps)
        shares, levels = zip(*(_layer(seen, q, k, owner) for (q, owner), (k, _) in zip(queries, keys, strict=True)))
        length = Peak(jnp.float32(seen.real_BT.shape[1]))
        return {"share": by_layer(shares), "uniform": by_layer(levels), "length": length}

    def values(self, totals: dict[str, np.ndarray]) -> Values:
        found = layered("attention_sink", totals["share"])
        uniform, length = float(np.mean(totals["uniform"])), float(totals["length"])
        return found | {"attention_sink_uniform": uniform, "attention_sink_length": length}


def _layer(seen: Seen, q_BTHK: jax.Array, k_BTGK: jax.Array, owner: Mixer) -> tuple[Mean, Mean]:
    """The share of the first key, and what it would be if all visible keys had the same."""
    visible_BTS, first_BS = _visible(seen, owner)
    sees_first_BT = jnp.any(visible_BTS & first_BS[:, None, :], -1)
    counted_BT = seen.real_BT & sees_first_BT & ~first_BS
    has_logits = isinstance(owner, Attention) and owner.sinks is not None
    logits_H = owner.sinks[...].astype(jnp.float32) if has_logits else None

    def of_row(row) -> jax.Array:
        q_THK, k_TGK, visible_TS, first_S = row
        T, H, K = q_THK.shape
        G = k_TGK.shape[1]
        q_TGRK = jnp.reshape(q_THK.astype(jnp.float32) * owner.scale, (T, G, H // G, K))
        s_HTS = jnp.reshape(jnp.einsum("tgrk,sgk->grts", q_TGRK, k_TGK.astype(jnp.float32)), (H, T, -1))
        if isinstance(owner, Attention) and owner.soft_cap is not None:
            s_HTS = owner.soft_cap * jnp.tanh(s_HTS / owner.soft_cap)
        s_HTS = jnp.where(visible_TS, s_HTS, MASKED)
        log_z_HT = jax.nn.logsumexp(s_HTS, -1)
        if logits_H is not None:
            log_z_HT = jnp.logaddexp(log_z_HT, logits_H[:, None])
        s_first_HT = jnp.sum(jnp.where(first_S, s_HTS, 0.0), -1)
        return jnp.mean(jnp.exp(s_first_HT - log_z_HT), 0)

    # Row by row: the scores of a batch would not fit.
    share_BT = jax.lax.map(of_row, (q_BTHK, k_BTGK, visible_BTS, first_BS))
    keys_BT = jnp.maximum(jnp.sum(visible_BTS, -1), 1).astype(jnp.float32)
    return seen.mean_where(share_BT, counted_BT), seen.mean_where(1 / keys_BT, counted_BT)


def _visible(seen: Seen, owner: Mixer) -> tuple[jax.Array, jax.Array]:
    """(bool [B, T, S], which keys a query sees; bool [B, S], which is the first of its row)."""
    segments_BT, batch = seen.batch["segment_ids"], seen.batch
    # Rows of which devices hold the tokens out of order say where each one belongs.
    in_order_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    order_BT = batch.get("order", in_order_BT)
    apart_BTS = order_BT[:, :, None] - order_BT[:, None, :]
    visible_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    if isinstance(owner, MLA) or owner.causal:
        past_BTS = apart_BTS >= 0
        visible_BTS &= past_BTS | batch["prefix"].astype(bool)[:, None, :] if "prefix" in batch else past_BTS
    if isinstance(owner, Attention) and owner.window is not None:
        visible_BTS &= jnp.abs(apart_BTS) < owner.window
    return visible_BTS, order_BT == 0
