"""Quantizers by arithmetic: bijections, gradients, entropies by brute force, the published library as oracle."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.quantizers import BSQ, FSQ, LFQ, bit_entropies

RNGS = nnx.Rngs(params=0)
F = functools.partial


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (7, 5, 3), (3,), (4, 8, 6)])
def test_fsq_every_id_is_its_own_code(levels):
    fsq = FSQ(levels=levels, rngs=RNGS)
    codes = np.asarray(jax.jit(fsq.ids_to_codes)(np.arange(fsq.vocab_size)))
    assert len(np.unique(codes, axis=0)) == fsq.vocab_size and np.abs(codes).max() <= 1
    # a latent that tanh takes exactly there
    half = (np.array(levels) - 1) * 1.001 / 2
    off = np.where(np.array(levels) % 2 == 0, 0.5, 0.0)
    reached = codes * (np.array(levels) // 2)
    z = np.arctanh((reached + off) / half) - np.arctanh(off / half)
    zq, ids, aux = jax.jit(fsq.__call__)(z.astype(np.float32))
    np.testing.assert_array_equal(ids, np.arange(fsq.vocab_size))
    np.testing.assert_allclose(zq, codes, atol=1e-6)
    assert aux == {}


def test_fsq_gradient_and_dtype():
    fsq = FSQ(levels=(8, 5), rngs=RNGS)
    z = np.array([[0.3, -1.2], [2.0, 0.0]], np.float32)
    gradient, zq = jax.jit(jax.grad(lambda z: (jnp.sum(fsq(z)[0]), fsq(z)[0]), has_aux=True))(z)
    half, shift = np.array([3.5035, 2.002]), np.array([np.arctanh(0.5 / 3.5035), 0.0])
    expected = half / np.array([4, 2]) * (1 - np.tanh(z + shift) ** 2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    assert float(zq[1, 1]) == 0  # an odd number of levels has 0
    low = z.astype(jnp.bfloat16)  # quantized in float32, whatever the input
    call = jax.jit(fsq.__call__)
    zq, ids, _ = call(low)
    assert zq.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ids, call(low.astype(np.float32))[1])


def test_lfq_bits_and_loss():
    lfq = LFQ(bits=4, entropy_weight=0.3, diversity=0.7, commitment=0.5, inverse_temperature=0.6, rngs=RNGS)
    z = normal(0, 50, 4)
    zq, ids, aux = jax.jit(lfq.__call__)(z)
    np.testing.assert_array_equal(ids, (z > 0) @ [8, 4, 2, 1])  # the most significant bit first
    np.testing.assert_array_equal(jax.jit(lfq.ids_to_codes)(ids), np.sign(z))
    np.testing.assert_allclose(zq, np.sign(z), atol=1e-6)
    p, codes = _brute(z, 0.6)
    sample = -np.mean(np.sum(p * np.log(p), 1))
    bits = p.mean(0) @ (codes > 0)
    mean = -np.sum(bits * np.log(bits) + (1 - bits) * np.log(1 - bits))
    commitment = np.mean((z - np.sign(z)) ** 2)
    np.testing.assert_allclose(aux["loss"], 0.3 * (sample - 0.7 * mean) + 0.5 * commitment, rtol=1e-5)


def _brute(z, inverse_temperature):
    """p over all 2^n codes, softmax(2 inverse_temperature z . code), and the codes."""
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=z.shape[-1])))
    scores = 2 * inverse_temperature * np.asarray(z, np.float64) @ codes.T
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), codes


def test_entropies_over_bits_are_those_over_codes():
    z = normal(1, 64, 8)
    p, _ = _brute(z, 0.4)
    sample, mean = jax.jit(bit_entropies)(4 * 0.4 * z)
    np.testing.assert_allclose(sample, -np.mean(np.sum(p * np.log(p), 1)), rtol=1e-5)
    joint = -np.sum(p.mean(0) * np.log(p.mean(0)))
    assert float(mean) >= joint
    gradient = jax.jit(jax.grad(lambda z: bit_entropies(400 * z)[0] - bit_entropies(400 * z)[1]))(z)
    assert np.isfinite(gradient).all()


def test_bsq_lies_on_the_sphere():
    bsq = BSQ(bits=6, rngs=RNGS)
    z, call = 5 * normal(2, 3, 7, 6), jax.jit(bsq.__call__)
    zq, ids, aux = call(z)
    np.testing.assert_allclose(np.sum(np.square(zq), -1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(bsq.ids_to_codes)(ids), zq, atol=1e-6)
    np.testing.assert_allclose(call(2 * z)[2]["loss"], aux["loss"], rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda z: jnp.sum(bsq(z)[0])))(jnp.zeros((2, 6)))).all()


@pytest.mark.parametrize("quantizer", [F(FSQ, levels=(5, 4)), F(LFQ, bits=3), F(BSQ, bits=3)])
def test_an_id_outside_the_vocabulary_is_no_code(quantizer):
    q = quantizer(rngs=RNGS)
    codes = jax.jit(q.ids_to_codes)(np.array([0, q.vocab_size - 1, q.vocab_size, -1]))
    np.testing.assert_array_equal(np.isnan(codes).all(-1), [False, False, True, True])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (F(FSQ, levels=(2, 5)), "levels"),
        (F(FSQ, levels=(5.0,)), "levels"),
        (F(FSQ, levels=()), "levels"),
        (F(FSQ, levels=(1000, 1000, 3000)), "2\\^31"),
        (F(LFQ, bits=0), "bits"),
        (F(BSQ, bits=31), "bits"),
        (F(LFQ, bits=3, commitment=-1.0), "commitment"),
        (F(LFQ, bits=3, inverse_temperature=0.0), "inverse_temperature"),
    ],
)
def test_refuses(make, word):
    with pytest.raises(ValueError, match=word):
        make(rngs=RNGS)


def test_the_published_library_agrees():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("vector_quantize_pytorch")
    z = np.random.default_rng(0).normal(0, 1.5, (100_000, 4)).astype(np.float32)
    theirs, their_ids = library.FSQ(levels=[8, 5, 5, 5])(torch.tensor(z)[None])
    zq, ids, _ = jax.jit(FSQ(levels=(8, 5, 5, 5), rngs=RNGS).__call__)(z)
    same = np.asarray(ids) == their_ids[0].numpy()
    assert np.mean(same) > 0.9999, "all but ties of the last float"
    np.testing.assert_allclose(np.asarray(zq)[same], theirs[0].detach().numpy()[same], atol=1e-5)
    bits = np.random.default_rng(1).normal(0, 1, (2000, 10)).astype(np.float32)
    lfq = library.LFQ(codebook_size=2**10, dim=10)
    lfq.eval()
    _, their_ids, _ = lfq(torch.tensor(bits)[None])
    np.testing.assert_array_equal(jax.jit(LFQ(bits=10, rngs=RNGS).__call__)(bits)[1], their_ids[0].numpy())
