"""Chunked cross-entropy against optax's plain one on all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layers import axes
from layers.language_model import mask_padding
from maxlike.collectives import by_axis, collectives
from maxlike.objectives.cross_entropy import FEWEST_CHUNKS, chunk_length, cross_entropy
from maxlike.sharding import Mesh
from tests import tiny

B, T, D, V = 3, 10, 5, 23
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.choice([0.0, 1.0, 0.5], (B, T)), jnp.float32)


def head(weights, hidden):
    return 7.0 * jnp.tanh(jnp.matmul(hidden, weights.T, preferred_element_type=jnp.float32) / 7.0)  # soft-capped


def plain(hidden, weights, z_loss):
    logits = head(weights, hidden)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(WEIGHTS * (nats + z_loss * log_z**2))


def chunked(hidden, weights, z_loss, chunk, targets=TARGETS):
    logits = functools.partial(head, weights)
    return cross_entropy(logits, hidden, targets, WEIGHTS, z_loss=z_loss, chunk=chunk)[0]


@functools.cache
def expected(z_loss):
    """(value, (gradient of the hidden states, gradient of the head)) with all logits at once."""
    return jax.jit(jax.value_and_grad(functools.partial(plain, z_loss=z_loss), (0, 1)))(HIDDEN, HEAD)


def close(got, wanted, tolerance=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, wanted)


@pytest.mark.parametrize(("chunk", "z_loss"), [(1, 0.1), (4, 0.1), (5, 0.0), (99, 0.1), (None, 0.0)])
def test_value_and_gradients_are_those_of_all_logits_at_once(chunk, z_loss):
    ours = jax.jit(jax.value_and_grad(functools.partial(chunked, z_loss=z_loss, chunk=chunk), (0, 1)))
    close(ours(HIDDEN, HEAD), expected(z_loss))


def test_the_backward_pass_applies_what_the_loss_is_multiplied_by():
    """The gradient is made in the forward pass, before anything is known about the use of the loss."""
    ours = jax.jit(jax.grad(lambda h, w: -3.0 * chunked(h, w, 0.1, 4), (0, 1)))
    close(ours(HIDDEN, HEAD), jax.tree.map(lambda g: -3.0 * g, expected(0.1)[1]), 1e-5)


def test_a_masked_target_may_be_no_token():
    targets = jnp.where(WEIGHTS > 0, TARGETS, -1)
    value, gradient = jax.jit(jax.value_and_grad(lambda h: chunked(h, HEAD, 0.1, 4, targets)))(HIDDEN)
    close((value, gradient), (expected(0.1)[0], expected(0.1)[1][0]))
    assert not np.any(np.asarray(gradient)[np.asarray(WEIGHTS) == 0])


def test_sums_are_exact_and_carry_no_gradient():
    parts_BTM = TARGETS[..., None] % 2 == jnp.arange(2)

    def loss(hidden):
        logits = functools.partial(head, HEAD)
        return cross_entropy(logits, hidden, TARGETS, WEIGHTS, z_loss=0.3, chunk=3, parts_BTM=parts_BTM)

    total, sums = jax.jit(loss)(HIDDEN)
    logits, weights = np.asarray(head(HEAD, HIDDEN), np.float64), np.asarray(WEIGHTS)
    log_z = np.log(np.sum(np.exp(logits), -1))
    gold = np.take_along_axis(logits, np.asarray(TARGETS)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sums.nats, np.sum(weights * (log_z - gold)), rtol=1e-6)
    np.testing.assert_allclose(sums.squared_log_z, np.sum(weights * log_z**2), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, np.sum(weights * (np.argmax(logits, -1) == TARGETS)), rtol=1e-6)
    np.testing.assert_allclose(total, sums.nats + 0.3 * sums.squared_log_z, rtol=1e-6)
    for part in (0, 1):
        here = np.asarray(TARGETS) % 2 == part
        np.testing.assert_allclose(sums.nats_M[part], np.sum((weights * (log_z - gold))[here]), rtol=1e-6)
    assert not np.any(jax.jit(jax.grad(lambda h: loss(h)[1].nats))(HIDDEN))


def test_logits_of_minus_infinity_are_no_candidates():
    """A padded vocabulary: its columns change neither the value nor the gradients."""

    def padded(h):
        return jnp.pad(head(HEAD, h), ((0, 0), (0, 0), (0, 9)), constant_values=-jnp.inf)

    ours = jax.jit(jax.value_and_grad(lambda h: cross_entropy(padded, h, TARGETS, WEIGHTS, z_loss=0.1, chunk=4)[0]))
    close(ours(HIDDEN), (expected(0.1)[0], expected(0.1)[1][0]))


def test_a_bfloat16_heads_gradients_are_summed_in_float32():
    """200 chunks of one position that give the same gradient: summed in bfloat16 they would stop growing."""
    hidden, weights = jnp.ones((1, 200, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    targets, ones = jnp.zeros((1, 200), jnp.int32), jnp.ones((1, 200))

    def loss(weights):
        logits = functools.partial(head, weights)
        return cross_entropy(logits, hidden + 0.01171875, targets, ones, z_loss=0.0, chunk=1)[0]

    gradient = jax.jit(jax.grad(loss))(weights)
    assert gradient.dtype == jnp.bfloat16
    exact = 0.5 * 200 * float((hidden + 0.01171875)[0, 0, 0])
    np.testing.assert_allclose(gradient.astype(jnp.float32)[:, 0], [-exact, exact], rtol=2**-8)


@pytest.mark.parametrize("differentiated", [True, False])
def test_no_float32_buffer_holds_all_logits(differentiated):
    rows, length, dim, vocab = 2, 64, 8, 512

    def loss(hidden, weights, chunk):
        targets = jnp.zeros((rows, length), jnp.int32)
        logits = functools.partial(head, weights)
        return cross_entropy(logits, hidden, targets, jnp.ones((rows, length)), z_loss=1e-4, chunk=chunk)[0]

    def largest(chunk):
        function = functools.partial(loss, chunk=chunk)
        program = jax.jit(jax.value_and_grad(function, (0, 1)) if differentiated else function)
        text = program.lower(jnp.zeros((rows, length, dim)), jnp.zeros((vocab, dim))).compile().as_text()
        return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(None) <= rows * length * vocab // FEWEST_CHUNKS
    assert largest(length) >= rows * length * vocab  # the check can fail


def test_chunks_are_chosen_by_memory():
    assert chunk_length(1, 1, 50000) == 1
    assert chunk_length(8, 256, 4096) == 64  # a quarter of the length
    assert chunk_length(2, 2048, 262144) == 16  # 32 MiB of logits


def test_on_a_mesh_neither_logits_nor_the_heads_rows_travel():
    """Rows on data and fsdp, the vocabulary, padded, on tensor; a length that no number of chunks divides."""
    rows, length, dim, vocab = 8, 7, 6, 32
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(rows, length, dim)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(vocab, dim)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab - 3, (rows, length)), jnp.int32)
    counts = jnp.asarray(rng.choice([0.0, 1.0, 2.0], (rows, length)), jnp.float32)

    def loss(hidden, weights):
        logits = functools.partial(lambda w, h: mask_padding(head(w, h), vocab - 3), weights)
        return cross_entropy(logits, hidden, targets, counts, z_loss=0.1, chunk=2)[0]

    differentiate = jax.value_and_grad(loss, (0, 1))
    wanted = jax.jit(differentiate)(hidden, weights)
    layout = Mesh(shape={"data": 2, "fsdp": 2, "tensor": 2}, rules=tiny.load().mesh.rules).open()

    def placed(hidden, weights):
        with axes.place_with(layout):
            return differentiate(hidden, weights)

    where = (layout.batch(hidden.shape), layout.sharding(("vocab", "embed"), weights.shape, "head"))
    compiled = jax.jit(placed, in_shardings=where, out_shardings=(None, where)).lower(hidden, weights).compile()
    close(compiled(*jax.device_put((hidden, weights), where)), wanted, 1e-5)
    found = by_axis(collectives(compiled.as_text(), layout.mesh))
    assert {key for key in found if key[0] != "all-reduce"} == {("all-gather", ("fsdp",))}
    assert found["all-gather", ("fsdp",)] == vocab // 2 * dim * 4 // 2  # the head's columns
    # the head's gradient once, and five sums, not once a chunk
    assert found["all-reduce", ("data", "fsdp")] <= 2 * 3 / 4 * (vocab // 2 * dim * 4 + 64)
