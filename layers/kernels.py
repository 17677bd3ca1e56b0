"""One place where an operation picks its implementation, and says which it took and why.

Choices are made while a program is traced. `report()` lists them for the start-up table; a slower implementation than
the fastest known is always listed with its reason. `choose` overrides a choice, `compile_for` names the platform when
it is not the one that runs this process (compiling for a TPU on a CPU machine).
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from layers import axes
from layers.blocked_attention import blocked_attention
from layers.masked_attention import chunked_attention, masked_attention, visibility
from layers.ring_attention import ring_attention

IMPLEMENTATIONS = {
    "attention": ("cudnn", "splash", "blocked", "chunked", "xla"),
    "context_attention": ("ring", "gather"),
    "dual_chunk": ("whole", "chunked"),
    "layers": ("scan", "unrolled"),
    "recurrence": ("scan", "grouped"),
    "grouped_matmul": ("blocked", "ragged_dot"),
}
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_chosen: contextvars.ContextVar[tuple[tuple[str, str], ...]] = contextvars.ContextVar("chosen", default=())
_taken: dict[tuple[str, str, str], None] = {}


def platform() -> str:
    """The platform that programs are traced for: "cpu", "gpu" or "tpu"."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def compile_for(name: str) -> Iterator[None]:
    """Inside this context implementations are picked for platform `name`, whatever runs this process."""
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform {name!r} must be 'cpu', 'gpu' or 'tpu'")
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)


@contextlib.contextmanager
def choose(op: str, implementation: str) -> Iterator[None]:
    """Inside this context `op` takes `implementation`; refuses a pair that is not in IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS.get(op, ()):
        raise ValueError(f"no implementation {implementation!r} of {op!r}; known: {IMPLEMENTATIONS}")
    token = _chosen.set((*_chosen.get(), (op, implementation)))
    try:
        yield
    finally:
        _chosen.reset(token)


def report() -> list[tuple[str, str, str]]:
    """(op, implementation, reason) of every choice since the last `forget`, in order of first use."""
    return list(_taken)


def forget() -> None:
    """Empties the report, before another model is traced."""
    _taken.clear()


def take(op: str, implementation: str, reason: str) -> str:
    """Records a choice unless `choose` overrides it, and returns the implementation to use."""
    chosen = dict(_chosen.get())
    if op in chosen:
        implementation, reason = chosen[op], "chosen by hand"
    _taken[(op, implementation, reason)] = None
    return implementation


def attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    segments_BT: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    prefix_BT: jax.Array | None = None,
    order_BT: jax.Array | None = None,
) -> jax.Array:
    """Attention of a row on itself: softmax(cap(scale q k^T) where visible, with sinks) v, [B, T, H, V].

    A query sees a key of its own segment, not after it if causal unless the key is of the prefix, and fewer than
    `window` positions away. H must be a multiple of the number of key heads G; V, the width of a value, may differ from
    K. Softmax in float32. order_BT: the place of each token in its row; None for rows stored in order. Where a mesh
    cuts the length, keys come from the other devices.
    """
    if order_BT is not None or axes.mesh_axes("length"):
        return ring_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            segments_BT=segments_BT,
            sinks_H=sinks_H,
            prefix_BT=prefix_BT,
            order_BT=order_BT,
            gather=take("context_attention", "ring", "a device holds two parts of the keys at a time") == "gather",
        )
    width = max(q_BTHK.shape[3], v_BTGK.shape[3])
    picked = pick_attention(q_BTHK, window, soft_cap, segments_BT, sinks_H, prefix_BT, width)
    implementation = take("attention", *picked)
    if implementation == "cudnn":
        return _cudnn(q_BTHK, k_BTGK, v_BTGK, segments_BT, scale=scale, causal=causal, window=window)
    if implementation == "splash":
        from layers.splash import splash_attention  # half a second that no other platform needs

        return splash_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            segments_BT,
            sinks_H,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            interpret=platform() != "tpu",
        )
    if implementation in ("blocked", "chunked"):
        attend = blocked_attention if implementation == "blocked" else chunked_attention
        return attend(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            segments_BT,
            sinks_H,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            prefix_BT=prefix_BT,
        )
    T = q_BTHK.shape[1]
    positions_1T = jnp.arange(T)[None]
    visible_BTS = visibility(positions_1T, positions_1T, causal=causal, window=window, prefix_BS=prefix_BT)
    if segments_BT is not None:
        visible_BTS = visible_BTS & (segments_BT[:, :, None] == segments_BT[:, None, :])
    k_BGTK, v_BGTK = jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2)
    return masked_attention(q_BTHK, k_BGTK, v_BGTK, visible_BTS, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)


def pick_attention(q_BTHK, window, soft_cap, segments_BT, sinks_H, prefix_BT=None, width=None) -> tuple[str, str]:
    """The fastest implementation that has every feature asked for, and why no faster one; width: of a head, None for
    that of the queries."""
    T, K = q_BTHK.shape[1], q_BTHK.shape[3] if width is None else width
    # Blocks keep half of all scores for the backward pass: worth it up to this length.
    in_xla = "blocked" if T <= 1024 else "chunked"
    if platform() == "cpu":
        return in_xla, "fastest measured on CPU" if T <= 1024 else f"scores of {T} tokens are too large to keep"
    if platform() == "gpu":
        refusals = [
            (jax.default_backend() != "gpu", "cuDNN can be traced only where a GPU is"),
            (q_BTHK.dtype not in (jnp.bfloat16, jnp.float16), f"cuDNN does not take {q_BTHK.dtype}"),
            (soft_cap is not None, "cuDNN has no logit soft-cap"),
            (sinks_H is not None, "cuDNN has no sinks"),
            (prefix_BT is not None, "cuDNN has no prefix that all tokens see"),
            (K % 8 != 0 or K > 128, f"cuDNN does not take head_dim {K}"),
        ]
        reason = next((why for refused, why in refusals if refused), None)
        if reason is None:
            return "cudnn", "flash attention of cuDNN" + ("" if segments_BT is None else ", segments as a mask")
        return in_xla, reason
    if T % 128:
        return in_xla, f"the flash kernel takes rows of a multiple of 128 tokens, not {T}"
    if prefix_BT is not None:
        return in_xla, "the flash kernel has no prefix that all tokens see"
    return "splash", "flash kernel, on each device's rows and heads"


def _cudnn(q_BTHK, k_BTGK, v_BTGK, segments_BT, *, scale, causal, window):
    mask_B1TS = None
    if segments_BT is not None:
        mask_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    sides = None if window is None else (window - 1, 0 if causal else window - 1)
    # One width for keys and values: zeros change no score, and those of the values are cut off again.
    value_dim, width = v_BTGK.shape[3], max(q_BTHK.shape[3], v_BTGK.shape[3])
    q_BTHK, k_BTGK, v_BTGK = (jnp.pad(z, [(0, 0)] * 3 + [(0, width - z.shape[3])]) for z in (q_BTHK, k_BTGK, v_BTGK))
    y_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        mask=mask_B1TS,
        scale=scale,
        is_causal=causal,
        local_window_size=sides,
        implementation="cudnn",
    )
    return y_BTHK[..., :value_dim]
