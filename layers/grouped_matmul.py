"""Matrix products of rows with the weight of their own group: what a dropless mixture of experts computes.

Rows are sorted by group. Letters: M rows, E groups, I and O the width of a row before and after; N blocks of B rows.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layers import kernels

Product = Callable[[jax.Array, jax.Array], jax.Array]


def in_groups(x_MI: jax.Array, sizes_E: jax.Array, body: Callable[[Product, jax.Array], jax.Array]) -> jax.Array:
    """body(product, x) -> y, with `product(x, w_EIO)` the product of each row with the weight of its group: y_MO.

    x_MI: rows sorted by group; sizes_E: int32 rows of each group, 0 allowed, sum at most M. Rows past the last group
    come back as zeros and have no gradient. body applies products and functions that work row by row and send 0 to 0,
    on the rows in whatever layout is fastest here. Linear in M in time and memory, whatever the sizes.
    """
    if kernels.take("grouped_matmul", *pick()) == "ragged_dot":
        used_M1 = jnp.arange(x_MI.shape[0])[:, None] < jnp.sum(sizes_E)
        y_MO = body(lambda x, w_EIO: jax.lax.ragged_dot(x, w_EIO, sizes_E), jnp.where(used_M1, x_MI, 0))
        return jnp.where(used_M1, y_MO, 0)
    blocks = Blocks.of(sizes_E, x_MI.shape[0])
    y_NBO = body(blocks.product, blocks.spread(x_MI))
    return blocks.collect(y_NBO)


def grouped_matmul(x_MI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_MO: row m times the weight of its group, zero past the last group; see `in_groups`."""
    return in_groups(x_MI, sizes_E, lambda product, x: product(x, w_EIO))


def pick() -> tuple[str, str]:
    """The fastest implementation on this platform, and why."""
    if kernels.platform() == "tpu":
        return "ragged_dot", "one kernel on TPU"
    return "blocked", f"ragged_dot expands densely on {kernels.platform()}: E times the work and the memory"


def take_rows(x_RD: jax.Array, index_N: jax.Array, back_RJ: jax.Array) -> jax.Array:
    """y_ND = x_RD[index_N], zero where the index is not in [0, R).

    back_RJ lists, for each row of x, the J places of y that it went to (out of range: none), so that the backward pass
    is a gather and a sum: the transpose that autodiff derives would be a scatter, slow on TPU and not deterministic on
    GPU.
    """
    return _take_rows(x_RD, index_N, back_RJ)


def gather_rows(x_RD: jax.Array, index: jax.Array) -> jax.Array:
    """x_RD[index], zero where the index is not in [0, R); the derivative is autodiff's."""
    return x_RD.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def _take_rows(x_RD, index_N, back_RJ):
    return gather_rows(x_RD, index_N)


def _take_rows_backward(back_RJ, g_ND):
    if back_RJ.shape[1] == 1:
        return gather_rows(g_ND, back_RJ[:, 0]), None, None
    parts = (gather_rows(g_ND, back_RJ[:, j]).astype(jnp.float32) for j in range(back_RJ.shape[1]))
    return sum(parts).astype(g_ND.dtype), None, None


_take_rows.defvjp(lambda x_RD, index_N, back_RJ: (gather_rows(x_RD, index_N), back_RJ), _take_rows_backward)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows laid out in blocks of one size, each of one group and filled up with zeros.

    group_N: group of each block; used: how many blocks hold rows; row_N: which row each place holds, M for none;
    place_M: where each row lies, past the end for rows of no group.
    """

    group_N: jax.Array
    used: jax.Array
    row_N: jax.Array
    place_M: jax.Array
    size: int

    @classmethod
    def of(cls, sizes_E: jax.Array, M: int) -> "Blocks":
        E = sizes_E.shape[0]
        B = block_size(M, E)
        # Every group but the empty ones may waste B - 1 places of its last block.
        N = max((M + (B - 1) * min(E, M)) // B, 1)
        ends_E, block_ends_E = jnp.cumsum(sizes_E), jnp.cumsum((sizes_E + B - 1) // B)
        starts_E, first_E = ends_E - sizes_E, block_ends_E - (sizes_E + B - 1) // B
        block_N = jnp.arange(N, dtype=jnp.int32)
        group_N = _group_of(block_N, block_ends_E)
        offset_NB = (block_N - first_E[group_N])[:, None] * B + jnp.arange(B, dtype=jnp.int32)
        row_NB = jnp.where(offset_NB < sizes_E[group_N][:, None], starts_E[group_N][:, None] + offset_NB, M)
        row_M = jnp.arange(M, dtype=jnp.int32)
        group_M = _group_of(row_M, ends_E)
        place_M = first_E[group_M] * B + row_M - starts_E[group_M]
        place_M = jnp.where(row_M < ends_E[-1], place_M, N * B)
        return cls(group_N, block_ends_E[-1], jnp.reshape(row_NB, -1), place_M, B)

    def spread(self, x_MI: jax.Array) -> jax.Array:
        x = take_rows(x_MI, self.row_N, self.place_M[:, None])
        return jnp.reshape(x, (-1, self.size, x_MI.shape[1]))

    def collect(self, y_NBO: jax.Array) -> jax.Array:
        return take_rows(jnp.reshape(y_NBO, (-1, y_NBO.shape[2])), self.place_M, self.row_N[:, None])

    def product(self, x_NBI: jax.Array, w_EIO: jax.Array) -> jax.Array:
        # A loop of a known length runs without asking the host on an accelerator; on CPU empty blocks are skipped.
        used = self.used if kernels.platform() == "cpu" else jnp.int32(self.group_N.shape[0])
        return _blocked(x_NBI, jnp.asarray(w_EIO), self.group_N, used)


def block_size(M: int, E: int) -> int:
    """Rows of a block: a power of two near half the mean group, between 8 and 128."""
    mean = max(M // max(E, 1), 1)
    return min(max(1 << (mean // 2).bit_length(), 8), 128)


def _group_of(index_N, ends_E):
    """The group that holds each index: how many groups end at or before it (the last one for what is past the end)."""
    group_N = jnp.sum(index_N[:, None] >= ends_E, 1, dtype=jnp.int32)
    return jnp.minimum(group_N, ends_E.shape[0] - 1)


def _zeros(shape, dtype, like):
    """Zeros that inside a shard_map vary over the mesh axes that `like` varies over, as the carry of a loop must."""
    return jax.lax.full_like(like, 0, dtype, shape)


@jax.custom_vjp
def _blocked(x_NBI, w_EIO, group_N, used):
    """Each of the first `used` blocks times the weight of its group, the rest zero."""

    def body(n, y_NBO):
        return y_NBO.at[n].set(x_NBI[n] @ w_EIO[group_N[n]])

    return jax.lax.fori_loop(0, used, body, _zeros((*x_NBI.shape[:2], w_EIO.shape[2]), x_NBI.dtype, x_NBI))


def _blocked_forward(x_NBI, w_EIO, group_N, used):
    return _blocked(x_NBI, w_EIO, group_N, used), (x_NBI, w_EIO, group_N, used)


def _blocked_backward(residuals, g_NBO):
    # One more loop for both gradients. The weight's is added up in place: autodiff of the forward loop would carry one
    # dense gradient of all groups for every block.
    x_NBI, w_EIO, group_N, used = residuals

    def body(n, carry):
        dx_NBI, dw_EIO = carry
        e, g_BO = group_N[n], g_NBO[n]
        dx_BI = jax.lax.dot_general(g_BO, w_EIO[e], (((1,), (1,)), ((), ())))
        dw_IO = jax.lax.dot_general(x_NBI[n], g_BO, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dx_NBI.at[n].set(dx_BI), dw_EIO.at[e].add(dw_IO)

    start = (jnp.zeros_like(x_NBI), _zeros(w_EIO.shape, jnp.float32, w_EIO))
    dx_NBI, dw_EIO = jax.lax.fori_loop(0, used, body, start)
    return dx_NBI, dw_EIO.astype(w_EIO.dtype), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
