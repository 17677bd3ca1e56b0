"""Chunked cross-entropy against optax's plain one on all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxlike.objectives.cross_entropy import FEWEST_CHUNKS, chunk_length, cross_entropy

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


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 99, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_value_and_gradients_are_those_of_all_logits_at_once(chunk, z_loss):
    ours = jax.jit(jax.value_and_grad(functools.partial(chunked, z_loss=z_loss, chunk=chunk), (0, 1)))
    theirs = jax.value_and_grad(functools.partial(plain, z_loss=z_loss), (0, 1))
    for got, expected in zip(jax.tree.leaves(ours(HIDDEN, HEAD)), jax.tree.leaves(theirs(HIDDEN, HEAD))):
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_gradients_scale_with_what_the_loss_is_used_for():
    """The gradient is made in the forward pass; the backward pass must still apply the cotangent."""
    grads = [
        jax.grad(lambda h, w, scale=scale: scale * chunked(h, w, 0.0, 4), (0, 1))(HIDDEN, HEAD) for scale in (1.0, -3.0)
    ]
    for one, other in zip(*grads):
        np.testing.assert_allclose(other, -3.0 * one, rtol=1e-6)


def test_a_masked_target_may_be_no_token():
    targets = jnp.where(WEIGHTS > 0, TARGETS, -1)
    got = jax.value_and_grad(lambda h: chunked(h, HEAD, 0.1, 4, targets))(HIDDEN)
    expected = jax.value_and_grad(lambda h: chunked(h, HEAD, 0.1, 4))(HIDDEN)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert not np.any(got[1][WEIGHTS == 0])


def test_sums_are_exact_and_carry_no_gradient():
    def loss(hidden):
        return cross_entropy(functools.partial(head, HEAD), hidden, TARGETS, WEIGHTS, z_loss=0.3, chunk=3)

    total, sums = loss(HIDDEN)
    logits = head(HEAD, HIDDEN)
    np.testing.assert_allclose(sums.nats, plain(HIDDEN, HEAD, 0.0), rtol=1e-6)
    np.testing.assert_allclose(sums.squared_log_z, jnp.sum(WEIGHTS * jax.nn.logsumexp(logits, -1) ** 2), rtol=1e-6)
    np.testing.assert_allclose(sums.correct, jnp.sum(WEIGHTS * (jnp.argmax(logits, -1) == TARGETS)), rtol=1e-6)
    np.testing.assert_allclose(total, sums.nats + 0.3 * sums.squared_log_z, rtol=1e-6)
    assert not np.any(jax.grad(lambda h: loss(h)[1].nats)(HIDDEN))


def test_logits_of_minus_infinity_are_no_candidates():
    """A padded vocabulary: its columns change neither the value nor the gradients."""

    def padded(h):
        return jnp.pad(head(HEAD, h), ((0, 0), (0, 0), (0, 9)), constant_values=-jnp.inf)

    got = jax.value_and_grad(lambda h: cross_entropy(padded, h, TARGETS, WEIGHTS, z_loss=0.1, chunk=4)[0])(HIDDEN)
    expected = jax.value_and_grad(lambda h: chunked(h, HEAD, 0.1, 4))(HIDDEN)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


def test_a_bfloat16_head_gets_gradients_summed_in_float32():
    """With one chunk and with ten the gradient of the head is the same: rounding happens once, at the end."""
    h, w = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    one, ten = (jax.grad(lambda w, c=c: chunked(h, w, 0.0, c))(w) for c in (10, 1))
    assert one.dtype == jnp.bfloat16
    exact = jax.grad(lambda w: plain(h.astype(jnp.float32), w, 0.0))(HEAD.astype(jnp.bfloat16).astype(jnp.float32))
    error = [float(jnp.max(jnp.abs(g.astype(jnp.float32) - exact))) for g in (one, ten)]
    assert max(error) < 0.02 * float(jnp.max(jnp.abs(exact)))


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
    assert chunk_length(64, 2048, 262144) * 64 * 262144 * 4 <= (1 << 25) * jax.device_count()
