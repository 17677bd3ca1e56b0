"""A linear recurrence over rows whose length is cut over devices: states are passed on instead of tokens.

The state is linear in the state before it, S_out = M S_in + S, and so is what it adds to an output, y_t + p_t^T S_in.
Every device runs its own tokens from a state of zero and so finds S and y; M and the probes p it finds

    without the delta rule   in closed form: M is all the decays together, p_t the query times those up to t
    with it                  in the same run, as N further columns of the values: zeros that start from a state of I

Then (M, S) of all devices are gathered, each folds those before its own, and adds p^T S_in. A device sends (C - 1) B H
N K float32 numbers of S, and of M (C - 1) B H, a channel's decay (C - 1) B H N, or the delta rule's (C - 1) B H N N.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from layers import axes

ROW = ("batch", "length")
HEADS = (*ROW, "act_heads", None)
STATE = ("batch", "act_heads", None, None)


class Inputs(NamedTuple):
    """Of `layers.recurrence`; log_decay: [H], [B, T, H] or [B, T, H, N]. real_BT: which tokens change the state."""

    q_BTGN: jax.Array
    k_BTGN: jax.Array
    v_BTHK: jax.Array
    log_decay: jax.Array
    beta_BTH: jax.Array | None
    segments_BT: jax.Array | None
    real_BT: jax.Array | None


# (inputs, initial_BHNK or None, run_BT or None, enter_B or None) -> (y_BTHK float32, state_BHNK).
Run = Callable[..., tuple[jax.Array, jax.Array]]


def pass_states(
    run: Run, runs: Callable[[jax.Array], jax.Array], x: Inputs, initial_BHNK: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(y_BTHK, the state after the row) where mesh axes cut the length.

    run: the recurrence on one device. runs: segments of whole rows -> which document of its row each token belongs to.
    """
    cut, heads = axes.mesh_axes("length"), axes.mesh_axes("act_heads")
    # Manual over every axis that cuts an operand: what is left to the compiler it may hold whole on every device.
    over = tuple(dict.fromkeys((*axes.mesh_axes("batch"), *cut, *heads)))
    x, shared = _share(x, len(heads) > 0)
    arrays = {name: z for name, z in x._asdict().items() if z is not None}
    specs = {name: HEADS[: z.ndim] for name, z in arrays.items()}
    specs |= {"log_decay": ("act_heads",) if x.log_decay.ndim == 1 else HEADS[: x.log_decay.ndim]}
    if shared:
        specs |= dict.fromkeys(("q_BTGN", "k_BTGN"), (*ROW, None, None))
    if initial_BHNK is not None:
        arrays["initial"], specs["initial"] = initial_BHNK, STATE

    def local(arrays):
        initial_BHNK = arrays.pop("initial", None)
        return _local(run, runs, Inputs(**{**dict.fromkeys(Inputs._fields), **arrays}), initial_BHNK, cut)

    return axes.shard_map(local, over=over, inputs=(specs,), outputs=(HEADS, STATE))(arrays)


def _share(x: Inputs, spread: bool) -> tuple[Inputs, bool]:
    """(the inputs, whether all devices have all queries and keys) where heads may be spread over devices: those of
    several groups are repeated for every head, so that each device has what its heads read."""
    G, H = x.q_BTGN.shape[2], x.v_BTHK.shape[2]
    if not spread or G in (1, H):
        return x, G == 1
    q_BTHN, k_BTHN = (jnp.repeat(z, H // G, 2) for z in (x.q_BTGN, x.k_BTGN))
    return x._replace(q_BTGN=q_BTHN, k_BTGN=k_BTHN), False


def _local(run: Run, runs: Callable, x: Inputs, initial_BHNK, over: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    B, T, H, K = x.v_BTHK.shape
    N, me, count = x.k_BTGN.shape[3], jax.lax.axis_index(over), jax.lax.axis_size(over)
    run_BT = enter_B = None
    if x.segments_BT is not None:
        whole_BS = runs(jax.lax.all_gather(x.segments_BT, over, axis=1, tiled=True))
        run_BT = jax.lax.dynamic_slice_in_dim(whole_BS, me * T, T, 1)
        enter_B = jax.lax.dynamic_slice_in_dim(jnp.pad(whole_BS, ((0, 0), (1, 0))), me * T, 1, 1)[:, 0]

    if x.beta_BTH is None:
        y_BTHK, state_BHNK = run(x, None, run_BT, enter_B)
        reach = _reach(x, run_BT, enter_B)  # [B, T, H or 1, N or 1]
        q_BTHN = jnp.repeat(x.q_BTGN, H // x.q_BTGN.shape[2], 2).astype(jnp.float32)
        probe_BTHN, through = q_BTHN * reach, reach[:, -1][..., None]
    else:
        zero_BTHN = jnp.zeros((B, T, H, N), x.v_BTHK.dtype)
        eye_BHNN = jnp.broadcast_to(jnp.eye(N), (B, H, N, N))
        start = jnp.concatenate([jnp.zeros((B, H, N, K)), eye_BHNN], -1) + axes.zeros((), jnp.float32, like=x.v_BTHK)
        wide = x._replace(v_BTHK=jnp.concatenate([x.v_BTHK, zero_BTHN], -1))
        y, state = run(wide, start, run_BT, enter_B)
        (y_BTHK, probe_BTHN), (state_BHNK, through) = (jnp.split(z, [K], -1) for z in (y, state))

    def fold(before_BHNK, xs):
        through, state_BHNK = xs
        carried = through * before_BHNK if x.beta_BTH is None else _product(through, before_BHNK)
        return carried + state_BHNK, before_BHNK

    first = axes.zeros((B, H, N, K), jnp.float32, like=state_BHNK)
    first = first if initial_BHNK is None else first + initial_BHNK
    gathered = jax.lax.all_gather((through, state_BHNK), over)
    last_BHNK, before = jax.lax.scan(fold, first, gathered)
    before_BHNK = jax.lax.dynamic_index_in_dim(before, me, 0, keepdims=False)
    dtype = x.q_BTGN.dtype
    y_BTHK = y_BTHK + jnp.einsum(
        "bthn,bhnk->bthk", probe_BTHN.astype(dtype), before_BHNK.astype(dtype), preferred_element_type=jnp.float32
    )
    # Every device has the same last state; the sum says so.
    return y_BTHK, jax.lax.psum(jnp.where(me == count - 1, last_BHNK, 0.0), over)


def _product(a_BHNN: jax.Array, b_BHNK: jax.Array) -> jax.Array:
    return jnp.einsum("bhmn,bhnk->bhmk", a_BHNN, b_BHNK, precision=jax.lax.Precision.HIGHEST)


def _reach(x: Inputs, run_BT, enter_B) -> jax.Array:
    """What is left at each token of the state before the first one, [B, T, H, N or 1]."""
    B, T, H, _ = x.v_BTHK.shape
    if x.log_decay.ndim == 1:
        ones_BT = jnp.ones((B, T)) if x.real_BT is None else x.real_BT.astype(jnp.float32)
        log_BTHN = (jnp.cumsum(ones_BT, 1)[..., None] * x.log_decay)[..., None]
    else:
        log_BTHN = jnp.cumsum(jnp.reshape(x.log_decay, (B, T, H, -1)), 1)
    reach_BTHN = jnp.exp(log_BTHN)
    if run_BT is None:
        return reach_BTHN
    return jnp.where((run_BT == enter_B[:, None])[..., None, None], reach_BTHN, 0.0)
