"""The grouped product against a loop over the groups, whatever their sizes; the memory of its backward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import kernels
from layers.experts import Experts
from layers.grouped_matmul import Blocks, block_size, grouped_matmul, take_rows

M, I, O = 45, 6, 5
SIZES = {
    "uneven": (7, 20, 1, 11),
    "empty groups": (0, 45, 0, 0),
    "rows of no group": (3, 0, 8, 0),
    "nothing": (0, 0, 0, 0),
    "odd": (11, 12, 11, 11),
}


def loop(x_MI, w_EIO, sizes_E):
    """The definition: one group after the other, zero for what is left."""
    rows, start = [], 0
    for e, size in enumerate(sizes_E):
        rows.append(x_MI[start : start + size] @ w_EIO[e])
        start += size
    return jnp.concatenate([*rows, jnp.zeros((x_MI.shape[0] - start, w_EIO.shape[2]))])


@functools.partial(jax.jit, static_argnums=0)
def looped(sizes_E, x_MI, w_EIO, g_MO):
    """Value and gradients of the definition."""
    y, pull = jax.vjp(functools.partial(loop, sizes_E=sizes_E), x_MI, w_EIO)
    return y, *pull(g_MO)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, ((M, I), (4, I, O), (M, O)))]


@pytest.mark.parametrize("implementation", ["blocked", "ragged_dot"])
def test_grouped_product_equals_a_loop_over_the_groups(arrays, implementation):
    x_MI, w_EIO, g_MO = arrays

    @jax.jit
    def values_and_gradients(sizes_E):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x_MI, w_EIO)
        return y, *pull(g_MO)

    with kernels.choose("grouped_matmul", implementation):
        for sizes in SIZES.values():
            for a, b in zip(values_and_gradients(jnp.asarray(sizes)), looped(sizes, *arrays), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_hold_every_row_once_and_only_rows_of_their_group():
    rng, E = np.random.default_rng(0), 6

    @jax.jit
    def laid_out(sizes_E):
        blocks = Blocks.of(sizes_E, M)
        return blocks.group_N, blocks.used, blocks.row_N, blocks.place_M

    for _ in range(30):
        sizes = rng.multinomial(int(rng.integers(0, M + 1)), rng.dirichlet(np.full(E, 0.3)))
        group_N, used, row_N, place_M = map(np.asarray, laid_out(jnp.asarray(sizes, jnp.int32)))
        row_NB = row_N.reshape(-1, block_size(M, E))
        group_M = np.repeat(np.arange(E), sizes)
        assert sorted(row_NB[row_NB < M]) == list(range(sizes.sum()))
        for n, rows in enumerate(row_NB):
            assert set(group_M[rows[rows < M]]) <= {int(group_N[n])}
            assert (n < int(used)) == bool((rows < M).any())
        assert (row_NB.reshape(-1)[place_M[: sizes.sum()]] == np.arange(sizes.sum())).all()
        assert (place_M[sizes.sum() :] >= row_NB.size).all()


def test_block_size_suits_the_groups():
    assert block_size(2, 64) == 8 and block_size(1 << 20, 8) == 128
    assert all(size & (size - 1) == 0 for size in (block_size(m, 8) for m in range(1, 5000, 37)))


def test_taking_rows_has_the_gradient_of_indexing():
    x_RD = jax.random.normal(jax.random.key(0), (4, 3))
    index_N, back_RJ = jnp.array([2, 0, 9, 2, 3]), jnp.array([[1, 5], [5, 5], [0, 3], [5, 4]])
    g_ND = jax.random.normal(jax.random.key(1), (5, 3))

    def plain(x):
        return jnp.where((index_N < 4)[:, None], x[jnp.minimum(index_N, 3)], 0)

    @jax.jit
    def both(x_RD):
        parts = jax.vjp(plain, x_RD), jax.vjp(lambda x: take_rows(x, index_N, back_RJ), x_RD)
        return [(y, *pull(g_ND)) for y, pull in parts]

    for a, b in zip(*both(x_RD), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_of_a_batch_of_experts_equal_the_grouped_form():
    experts = Experts(8, count=3, width=4, rngs=nnx.Rngs(params=0))
    x_ECD = jax.random.normal(jax.random.key(1), (3, 5, 8))
    together, grouped = jax.jit(lambda experts, x: (experts(x), experts.grouped(x.reshape(15, 8), jnp.full(3, 5))))(
        experts, x_ECD
    )
    np.testing.assert_allclose(together.reshape(15, 8), grouped, atol=1e-5)
    assert experts.flops_per_row == 2 * 3 * 8 * 4


@pytest.mark.parametrize("E", [2, 16])
def test_backward_memory_is_linear_in_the_rows_and_not_in_the_experts(E):
    D, F = 32, 64
    graph, params = jax.eval_shape(lambda: nnx.split(Experts(D, count=E, width=F, rngs=nnx.Rngs(params=0))))

    def temporary_bytes(rows):
        def loss(params, x_MD, sizes_E):
            return jnp.sum(jnp.square(nnx.merge(graph, params).grouped(x_MD, sizes_E)))

        x_MD, sizes_E = jax.ShapeDtypeStruct((rows, D), jnp.float32), jax.ShapeDtypeStruct((E,), jnp.int32)
        return (
            jax.jit(jax.grad(loss, (0, 1))).lower(params, x_MD, sizes_E).compile().memory_analysis().temp_size_in_bytes
        )

    small, large = temporary_bytes(4096), temporary_bytes(16384)
    assert large < 4.2 * small
    # Input, gate, up and their product with their gradients, and at most as much again for copies.
    assert large < 16384 * 4 * 2 * (3 * D + 6 * F)


@pytest.mark.parametrize(("knob", "value"), [("count", 0), ("width", 0), ("activation", "tanh"), ("std", 0.0)])
def test_experts_refuse_by_name(knob, value):
    with pytest.raises(ValueError, match=f"Experts.{knob}="):
        Experts(8, **({"count": 2, "width": 4} | {knob: value}), rngs=nnx.Rngs(params=0))
