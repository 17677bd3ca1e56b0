"""Attention by the flash kernel for TPUs that ships with JAX (`jax.experimental.pallas.ops.tpu.splash_attention`)."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from layers import axes

LANES = 128  # a block is a multiple of it
BLOCK = 512  # longest block of queries and of keys


def splash_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of a row on itself (Splash: FlashAttention-2, arXiv 2307.08691, with blocks that see nothing skipped);
    [B, T, H, V].

    The compiler cannot cut a kernel, so each device runs it on its own rows and heads; T must be whole here.
    interpret: run the kernel's Python in place of a TPU, to test it.

    Raises ValueError for T that is no multiple of 128.
    """
    T, H = q_BTHK.shape[1:3]
    if T % LANES:
        raise ValueError(
            f"the flash kernel takes rows of a multiple of {LANES} tokens, not {T}: change sequence_length, or take "
            "the attention 'blocked'"
        )
    over = tuple(dict.fromkeys((*axes.mesh_axes("batch"), *axes.mesh_axes("act_heads"))))
    heads = H // axes.shards("act_heads")
    if causal:
        mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    else:
        mask = masks.FullMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, window - 1), 0)
    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if T % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # Its tables are the program's constants, also where the first caller is being traced.
    with jax.ensure_compile_time_eval():
        attend = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=soft_cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

    def of_row(q_THK, k_TGK, v_TGV, segments_T, sinks_H):
        q_HTK, k_GTK, v_GTV = (jnp.swapaxes(z, 0, 1) for z in (q_THK, k_TGK, v_TGV))
        segments = None if segments_T is None else kernel.SegmentIds(q=segments_T, kv=segments_T)
        return jnp.swapaxes(attend(q_HTK * scale, k_GTK, v_GTV, segments, sinks_H), 0, 1)

    def local(q_BTHK, k_BTGK, v_BTGV, segments_BT, sinks_H):
        return jax.vmap(of_row, (0, 0, 0, 0, None))(q_BTHK, k_BTGK, v_BTGV, segments_BT, sinks_H)

    if not over:
        return local(q_BTHK, k_BTGK, v_BTGV, segments_BT, sinks_H)
    by_head = ("batch", None, "act_heads", None)
    inputs = (by_head, by_head, by_head, ("batch", None), ("act_heads",))
    # check: what a kernel gives carries no note of the devices it differs on.
    return axes.shard_map(local, over=over, inputs=inputs, outputs=by_head, check=False)(
        q_BTHK, k_BTGK, v_BTGV, segments_BT, sinks_H
    )
