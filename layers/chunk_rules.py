"""What one chunk of a linear recurrence computes: three rules over the same chunked arrays.

Each rule maps (state, chunk) -> (state, y). Arrays of a chunk have P parallel chunks in front; `state` has not. Matrix
products take the dtype of the inputs and accumulate in float32; decays, states and the delta rule's solve are float32.
Every exponent is at most 0, so nothing overflows however strong the decay.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SUB_CHUNK = 16  # below this length, products of halves are too small: one masked product does several lengths


class Chunk(NamedTuple):
    """C tokens of each of P chunks; G groups of R heads share a query and a key.

    q, k: [P, B, G, C, N]; v: [P, B, G, R, C, K]; log_decay: [P, B, G, R, C], or [P, B, G, C, N] a channel, or None
    where it is constant; beta: [P, B, G, R, C] or None; real: bool [P, B, C] or None; run: which document of its row a
    token belongs to, int32 [P, B, C], with enter, the same of the token before the chunk, [P, B]; or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    beta: jax.Array | None
    real: jax.Array | None
    run: jax.Array | None
    enter: jax.Array | None


class _Weights(NamedTuple):
    """Decays of a chunk: from s to t (pair, zero for s > t), from before it to t (row), from s to its end (column), and
    from before it to its end (total). Zero across a change of document."""

    pair: jax.Array
    row: jax.Array
    column: jax.Array
    total: jax.Array


def _dot(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _keep(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, 0.0)


def _weights(x: Chunk, constant_GR: jax.Array | None) -> _Weights:
    """Weights of a decay a head: pair [..., G, R, C, C], row and column [..., G, R, C], total [..., G, R]."""
    step_C = jnp.arange(x.q.shape[-2])
    past_CC = step_C[:, None] >= step_C
    if constant_GR is None:
        c = jnp.cumsum(x.log_decay, -1)
        pair = jnp.exp(jnp.where(past_CC, c[..., :, None] - c[..., None, :], -jnp.inf))
    else:
        lag_CC = jnp.where(past_CC, step_C[:, None] - step_C, 0)
        pair = _keep(past_CC, jnp.exp(constant_GR[..., None, None] * lag_CC))
        count = step_C + 1 if x.real is None else jnp.cumsum(x.real, -1)[..., None, None, :]
        c = constant_GR[..., None] * count
    row, column, total = jnp.exp(c), jnp.exp(c[..., -1:] - c), jnp.exp(c[..., -1])
    if x.run is None:
        return _Weights(pair, row, column, total)
    same, enters, leaves, through = _connections(x)
    return _Weights(
        _keep(same[..., None, None, :, :], pair),
        _keep(enters[..., None, None, :], row),
        _keep(leaves[..., None, None, :], column),
        _keep(through[..., None, None], total),
    )


def _connections(x: Chunk) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which pairs of tokens, which tokens with what came before the chunk, which with its end, and whether before with
    end belong to one document: [P, B, C, C], [P, B, C], [P, B, C], [P, B]."""
    last = x.run[..., -1]
    return (
        x.run[..., :, None] == x.run[..., None, :],
        x.run == x.enter[..., None],
        x.run == last[..., None],
        last == x.enter,
    )


def _carry(state: jax.Array | None, total: jax.Array, add: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """(state before each chunk, state after the last) of state <- total * state + add, over the P chunks in front.

    A state of None is zero and costs nothing; there is one chunk then.
    """
    total = jnp.broadcast_to(total, (*add.shape[:-1], 1))
    if add.shape[0] == 1:
        return (None, add[0]) if state is None else (state[None], total[0] * state + add[0])

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    through, added = jax.lax.associative_scan(join, (total, add))
    after = through * state + added
    return jnp.concatenate([state[None], after[:-1]]), after[-1]


def scalar_rule(state: jax.Array | None, x: Chunk, constant_GR: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """S <- decay S + k v^T with one decay a head (Lightning Attention-2, arXiv 2401.04658; SSD, arXiv 2405.21060).

    Decays multiply scores, v and y, never q or k, which the R heads of a group share unrepeated.
    """
    dtype, w = x.q.dtype, _weights(x, constant_GR)
    scores = _dot("...gtn,...gsn->...gts", x.q, x.k, dtype)
    y = _dot("...grts,...grsk->...grtk", scores[..., None, :, :] * w.pair, x.v, dtype)
    add = _dot("...gsn,...grsk->...grnk", x.k, x.v * w.column[..., None], dtype)
    before, state = _carry(state, w.total[..., None, None], add)
    if before is not None:
        y = y + w.row[..., None] * _dot("...gtn,...grnk->...grtk", x.q, before, dtype)
    return state, y


def delta_rule(state: jax.Array | None, x: Chunk, constant_GR: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """S <- decay (I - beta k k^T) S + beta k v^T (Gated DeltaNet, arXiv 2412.06464, section 3.3).

    S_t = sum_s decay(s..t) k_s u_s^T + decay(..t) S with u_t = beta_t (v_t - what S_{t-1} decayed answers to k_t): the
    u of a chunk solve a unit lower triangular system (the WY form), linear in the state before the chunk.
    """
    dtype, w = x.q.dtype, _weights(x, constant_GR)
    step_C = jnp.arange(x.q.shape[-2])
    answers = _dot("...gtn,...gsn->...gts", x.k, x.k, dtype)[..., None, :, :] * w.pair * x.beta[..., None]
    inverse = unit_lower_inverse(_keep(step_C[:, None] > step_C, answers))
    u = _dot("...ts,...sk->...tk", inverse, x.beta[..., None] * x.v, dtype)
    probe = x.beta * w.row
    probe = _dot("...grts,...grsn->...grtn", inverse, probe[..., None] * x.k[..., None, :, :], dtype)

    def step(state, xs):
        k, u, probe, column, total = xs
        u = u - _dot("...grtn,...grnk->...grtk", probe, state, dtype)
        add = _dot("...gsn,...grsk->...grnk", k, u * column[..., None], dtype)
        return total[..., None, None] * state + add, (state, u)

    column = jnp.broadcast_to(w.column, u.shape[:-1])
    total = jnp.broadcast_to(w.total, u.shape[:-2])
    before = None
    if state is None:
        state = _dot("...gsn,...grsk->...grnk", x.k, u * column[..., None], dtype)[0]
    else:
        state, (before, u) = jax.lax.scan(step, state, (x.k, u, probe, column, total))
    scores = _dot("...gtn,...gsn->...gts", x.q, x.k, dtype)
    y = _dot("...grts,...grsk->...grtk", scores[..., None, :, :] * w.pair, u, dtype)
    if before is not None:
        y = y + w.row[..., None] * _dot("...gtn,...grnk->...grtk", x.q, before, dtype)
    return state, y


@jax.custom_vjp
def unit_lower_inverse(a: jax.Array) -> jax.Array:
    """(I + a)^-1 of strictly lower triangular a, [..., C, C] float32, by matrix products alone.

    Blocks of 8 by their finite series I - a + a^2 - ..., then pairs of blocks by substitution: a series over all of C
    would cancel catastrophically where keys repeat.
    """
    C = a.shape[-1]
    if C == 1:  # decoding token by token
        return jnp.ones_like(a)
    size = max(8, 1 << (C - 1).bit_length())
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, size - C)] * 2)
    block = _diagonal(a, 8)
    square = _matmul(block, block)
    x = jnp.eye(8) - block
    x = x + _matmul(x, square)
    x = x + _matmul(x, _matmul(square, square))
    half = 8
    while half < size:
        first, second = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_matmul(second, _matmul(_diagonal(a, 2 * half)[..., half:, :half], first))
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        x = jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)
        half *= 2
    return x[..., 0, :C, :C]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(a):
    x = unit_lower_inverse(a)
    return x, x


def _inverse_backward(x, gradient):
    transposed = jnp.swapaxes(x, -1, -2)
    return (-_matmul(transposed, _matmul(gradient, transposed)),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def channel_rule(state: jax.Array | None, x: Chunk) -> tuple[jax.Array, jax.Array]:
    """S <- diag(decay) S + k v^T with a decay a channel of the key (GLA, Yang et al. 2023, arXiv 2312.06635).

    One head a group. C is a power of two.
    """
    dtype = x.q.dtype
    c = jnp.cumsum(x.log_decay, -2)
    row, column, total = jnp.exp(c), jnp.exp(c[..., -1:, :] - c), jnp.exp(c[..., -1, :])
    same = None
    if x.run is not None:
        same, enters, leaves, through = _connections(x)
        row, column = _keep(enters[..., None, :, None], row), _keep(leaves[..., None, :, None], column)
        total = _keep(through[..., None, None], total)
    v = x.v[..., 0, :, :]
    y = _within(x.q, x.k, v, c, same)[..., None, :, :]
    add = _dot("...sn,...sk->...nk", x.k * column, v, dtype)[..., None, :, :]
    before, state = _carry(state, total[..., None, :, None], add)
    if before is not None:
        y = y + _dot("...gtn,...grnk->...grtk", x.q * row, before, dtype)
    return state, y


def _within(q: jax.Array, k: jax.Array, v: jax.Array, c: jax.Array, same: jax.Array | None) -> jax.Array:
    """y_t = sum over s <= t of (sum_n q_tn k_sn exp(c_tn - c_sn)) v_s, [..., C, K] float32.

    exp(-c_s) alone overflows, and exp(c_t - c_s) for all pairs is C / 2 exponentials a channel. So pairs are sorted by
    halves: of every block of 2h tokens, the last h are queries of the first h, and the two decays to and from the
    block's middle are at most 1. Each h = 1, 2, 4, ... C / 2 costs one exponential a channel.
    """
    C, dtype = q.shape[-2], q.dtype
    y = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), -1, keepdims=True) * v.astype(jnp.float32)
    size = min(SUB_CHUNK, C)
    scores, half = 0.0, 1
    while half < size:  # all pairs inside a sub-chunk
        late = jnp.arange(C)[:, None] % (2 * half) >= half
        decay = jnp.exp(jnp.where(late, 1.0, -1.0) * (c - _middle(c, half)))
        parts = (_blocks(z * decay, size) for z in (q, k))
        block = jnp.arange(size) // (2 * half)
        late = late[:size, 0]
        mask = late[:, None] & ~late & (block[:, None] == block)
        scores = scores + _keep(mask, _dot("...tn,...sn->...ts", *parts, dtype))
        half *= 2
    if size > 1:
        if same is not None:
            scores = _keep(_diagonal(same, size)[..., None, :, :, :], scores)
        y = y + jnp.reshape(_dot("...ts,...sk->...tk", scores, _blocks(v, size), dtype), y.shape)
    while half < C:  # between the two halves of longer blocks
        (_, q_late), (k_early, _), (v_early, _) = (_halves(z, half) for z in (q, k, v))
        c_early, c_late = _halves(c, half)
        middle = c_early[..., -1:, :]
        scores = _dot(
            "...tn,...sn->...ts", q_late * jnp.exp(c_late - middle), k_early * jnp.exp(middle - c_early), dtype
        )
        if same is not None:
            scores = _keep(_diagonal(same, 2 * half)[..., None, :, half:, :half], scores)
        late = _dot("...ts,...sk->...tk", scores, v_early, dtype)
        y = y + jnp.reshape(jnp.stack([jnp.zeros_like(late), late], -3), y.shape)
        half *= 2
    return y


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., C, N] -> [..., C / size, size, N]."""
    return jnp.reshape(x, (*x.shape[:-2], -1, size, x.shape[-1]))


def _halves(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    x = _blocks(x, 2 * half)
    return x[..., :half, :], x[..., half:, :]


def _middle(c: jax.Array, half: int) -> jax.Array:
    """For each token, c of the last token of the first half of its block of 2 half tokens."""
    blocks = _blocks(c, 2 * half)
    return jnp.reshape(jnp.broadcast_to(blocks[..., half - 1 : half, :], blocks.shape), c.shape)


def _diagonal(pairs: jax.Array, size: int) -> jax.Array:
    """[..., C, C] -> its diagonal blocks [..., C / size, size, size]."""
    blocks = jnp.reshape(pairs, (*pairs.shape[:-2], pairs.shape[-1] // size, size, pairs.shape[-1] // size, size))
    return jnp.stack([blocks[..., i, :, i, :] for i in range(blocks.shape[-2])], -3)
