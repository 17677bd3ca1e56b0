"""The linear recurrence that linear attention, RetNet, GLA, DeltaNet, Gated DeltaNet and Mamba-2 share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from layers import axes, kernels
from layers.chunk_rules import Chunk, channel_rule, delta_rule, scalar_rule
from layers.state_passing import Inputs, pass_states

CHUNK = 64
TOGETHER = 64  # chunks at once where the device wants large products
SMALLEST = -100.0  # a log decay: exp of it is 0 in float32, and sums of it stay finite


def recurrence(
    q_BTHN: jax.Array,
    k_BTHN: jax.Array,
    v_BTHK: jax.Array,
    *,
    log_decay: jax.Array | None,
    beta_BTH: jax.Array | None = None,
    initial_BHNK: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    real_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """y_t = S_t^T q_t with S_t = decay_t S_{t-1} + k_t v_t^T, for every head; S_0 = `initial_BHNK`, or zero.

    With beta the state obeys the delta rule, S_t = decay_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (Gated
    DeltaNet, arXiv 2412.06464, eq. 10). The current token is included and nothing is scaled. T is any length.

    q, k: [B, T, G, N], where G divides H and each query and key serves H / G heads in a row (Mamba-2's C and B); v:
    [B, T, H, K]. log_decay <= 0: None (no decay), [H] (constant), [B, T, H] (a token), or [B, T, H, N] (a token and
    channel of the key; not with beta). beta in [0, 2].
    segments_BT: the state starts from zero where a document does; `initial` belongs to the row's first one. Padding (0)
    leaves the state alone. real_BT, bool: so do tokens that are False, wherever they are.
    Where a mesh cuts the length, states are passed on from device to device (`layers.state_passing`).
    chunk >= 1: tokens done at once by matrix products; between chunks the state is carried by a scan, whose backward
    pass keeps one state a step and computes the rest anew. It changes speed and memory, not the result.

    Returns y [B, T, H, K] in the dtype of v, and the state after the last token, float32 [B, H, N, K].
    """
    _check(q_BTHN, k_BTHN, v_BTHK, log_decay, beta_BTH, chunk)
    B, T, H, _ = v_BTHK.shape
    G = k_BTHN.shape[2]
    by_channel = log_decay is not None and log_decay.ndim == 4
    if by_channel and G < H:
        q_BTHN, k_BTHN = jnp.repeat(q_BTHN, H // G, 2), jnp.repeat(k_BTHN, H // G, 2)
    log_decay = jnp.zeros(H) if log_decay is None else jnp.maximum(jnp.asarray(log_decay, jnp.float32), SMALLEST)
    if log_decay.ndim == 1 and real_BT is not None:
        log_decay = jnp.broadcast_to(log_decay, (B, T, H))
    mask_BT = _contributing(segments_BT, real_BT)
    v_in_BTHK = v_BTHK
    if mask_BT is not None:
        v_in_BTHK = jnp.where(mask_BT[..., None, None], v_BTHK, 0)
        beta_BTH = None if beta_BTH is None else jnp.where(mask_BT[..., None], beta_BTH, 0)
        if log_decay.ndim > 1:
            log_decay = jnp.where(jnp.expand_dims(mask_BT, tuple(range(2, log_decay.ndim))), log_decay, 0.0)
    x = Inputs(q_BTHN, k_BTHN, v_in_BTHK, log_decay, beta_BTH, segments_BT, mask_BT)
    run = functools.partial(_run, chunk=chunk)
    if axes.mesh_axes("length"):
        y_BTHK, state_BHNK = pass_states(run, _runs, x, initial_BHNK)
    else:
        run_BT = None if segments_BT is None else _runs(segments_BT)
        y_BTHK, state_BHNK = run(x, initial_BHNK, run_BT, None if run_BT is None else jnp.zeros(B, run_BT.dtype))
    return y_BTHK.astype(v_BTHK.dtype), state_BHNK


def _run(x: Inputs, initial_BHNK, run_BT, enter_B, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(y_BTHK in float32, the state after the last token) of rows that lie on one device.

    run_BT: which document of its row each token belongs to, or None; enter_B: the same of the token before.
    """
    B, T, H, K = x.v_BTHK.shape
    G, N = x.k_BTGN.shape[2:]
    R, by_channel, mask_BT = H // G, x.log_decay.ndim == 4, x.real_BT
    state = None if initial_BHNK is None else jnp.reshape(initial_BHNK.astype(jnp.float32), (B, G, R, N, K))
    size, count, together = _plan(T, chunk, by_channel)
    if count * size > T and mask_BT is None:
        mask_BT = jnp.ones((B, T), bool)
    constant_GR = jnp.reshape(x.log_decay, (G, R)) if x.log_decay.ndim == 1 else None
    cut = functools.partial(_cut, count=count, size=size)
    decay_heads, decay_width = ((G,), (N,)) if by_channel else ((G, R), ())
    chunks = Chunk(
        q=cut(x.q_BTGN, (G,), (N,)),
        k=cut(x.k_BTGN, (G,), (N,)),
        v=cut(x.v_BTHK, (G, R), (K,)),
        log_decay=None if constant_GR is not None else cut(x.log_decay, decay_heads, decay_width),
        beta=None if x.beta_BTH is None else cut(x.beta_BTH.astype(jnp.float32), (G, R), ()),
        real=None if mask_BT is None or constant_GR is None else cut(mask_BT, (), ()),
        **_cut_runs(run_BT, enter_B, count, size),
    )
    rule = functools.partial(scalar_rule if x.beta_BTH is None else delta_rule, constant_GR=constant_GR)
    y, state = _scan(chunks, state, channel_rule if by_channel else rule, together)
    y_BTHK = jnp.reshape(jnp.moveaxis(y, (0, 4), (1, 2)), (B, count * size, H, K))[:, :T]
    return y_BTHK, jnp.reshape(state, (B, H, N, K))


def _plan(length: int, chunk: int, by_channel: bool) -> tuple[int, int, int]:
    """(tokens a chunk, chunks, how many of them at once)."""
    size = min(chunk, length)
    if by_channel:
        size = 1 << (size - 1).bit_length()  # its rule works by halves
    count = -(-length // size)
    if not by_channel:
        size = min(size, -(-length // (8 * count)) * 8)  # chunks of equal length waste less of the last one
    if count == 1:
        return size, 1, 1
    best = ("scan", "a chunk stays in the cache of a CPU core")
    if kernels.platform() != "cpu":
        best = ("grouped", f"few large products: up to {TOGETHER} chunks at once on {kernels.platform()}")
    together = min(count, TOGETHER) if kernels.take("recurrence", *best) == "grouped" else 1
    return size, -(-count // together) * together, together


def flops_per_token(length: int, *, heads: int, state: int, value: int) -> float:
    """Matrix products a token without the delta rule, 2 FLOPs a multiply-add: the cheaper of the one-token form, which
    writes and reads the state, and the form of all pairs of the row, halved by causality. The chunk is no part of it.
    """
    return heads * min(4.0 * state * value, 1.0 * length * (state + value))


def _check(q_BTHN, k_BTHN, v_BTHK, log_decay, beta_BTH, chunk) -> None:
    B, T, H, _ = v_BTHK.shape
    G, N = k_BTHN.shape[2:]
    if chunk < 1:
        raise ValueError(f"recurrence.chunk={chunk} must be at least 1 token, such as {CHUNK}")
    if q_BTHN.shape != k_BTHN.shape or k_BTHN.shape[:2] != (B, T) or H % G:
        raise ValueError(
            f"recurrence takes q and k of one shape [B, T, G, N] where G divides the heads of v [B, T, H, K], got "
            f"{q_BTHN.shape}, {k_BTHN.shape} and {v_BTHK.shape}"
        )
    shapes = {1: (H,), 3: (B, T, H), 4: (B, T, H, N)}
    if log_decay is not None and log_decay.shape != shapes.get(log_decay.ndim):
        raise ValueError(
            f"recurrence.log_decay has shape {log_decay.shape}: use one of {list(shapes.values())} or None"
        )
    # What is traced has no numbers yet: mixers keep it in range by how they make it.
    if log_decay is not None and not isinstance(log_decay, jax.core.Tracer):
        largest = np.max(np.asarray(log_decay), initial=-np.inf)
        if not largest <= 0:
            raise ValueError(f"recurrence.log_decay={largest} grows the state: decays are in (0, 1], their logs <= 0")
    if beta_BTH is not None and (beta_BTH.shape != (B, T, H) or (log_decay is not None and log_decay.ndim == 4)):
        raise ValueError(
            f"recurrence.beta_BTH of shape {beta_BTH.shape} must be {(B, T, H)}, and goes with a decay a head, not "
            "a channel"
        )


def _contributing(segments_BT, real_BT) -> jax.Array | None:
    """Which tokens change the state; None where all do."""
    if segments_BT is None:
        return real_BT
    return segments_BT != 0 if real_BT is None else (segments_BT != 0) & real_BT


def _cut(x: jax.Array, heads: tuple[int, ...], width: tuple[int, ...], count: int, size: int) -> jax.Array:
    """[B, T, ...] -> [count, B, *heads, size, *width], zeros (False) past T."""
    B, T = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(jnp.reshape(x, (B, count, size, *heads, *width)), 1, 0)
    return jnp.moveaxis(x, 2, 2 + len(heads))


def _runs(segments_BT: jax.Array) -> jax.Array:
    """Which document of its row each token belongs to, counted from 0, int32 [B, T].

    Padding counts to the document before it, so that it keeps the state.
    """
    T = segments_BT.shape[1]
    real = segments_BT != 0
    began = jnp.cumsum(real, 1) > real  # a real token came before
    changed = segments_BT != jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :T]
    return jnp.cumsum(real & began & changed, 1, dtype=jnp.int32)


def _cut_runs(run_BT, enter_B, count: int, size: int) -> dict[str, jax.Array | None]:
    """The documents of chunks, and that of the token before each of them."""
    if run_BT is None:
        return {"run": None, "enter": None}
    run_BT = jnp.pad(run_BT, ((0, 0), (0, count * size - run_BT.shape[1])), mode="edge")
    run = _cut(run_BT, (), (), count, size)
    return {"run": run, "enter": jnp.concatenate([enter_B[None], run[:-1, :, -1]])}


def _scan(x: Chunk, state: jax.Array | None, rule: Callable, together: int) -> tuple[jax.Array, jax.Array]:
    """(y [count, B, G, R, C, K], the last state) of the chunks in order, `together` of them a step."""
    count, B, G, R, _, K = x.v.shape
    if count == 1:  # no state to read where none is given, and nothing to compute anew
        state, y = rule(state, x)
        return y, state
    if state is None:
        state = axes.zeros((B, G, R, x.k.shape[-1], K), jnp.float32, like=x.v)
    x = jax.tree.map(lambda z: jnp.reshape(z, (count // together, together, *z.shape[1:])), x)
    state, y = jax.lax.scan(jax.checkpoint(rule), state, x)
    return jnp.reshape(y, (count, *y.shape[2:])), state
