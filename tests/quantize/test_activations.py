"""Fake quantization where numbers flow: of the inputs of matrices, of keys and of values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.linear import Linear
from maxlike.quantize.activations import FakeQuantized, asymmetric
from maxlike.quantize.hadamard import hadamard
from maxlike.quantize.recipe import Recipe
from tests.reference import quantize as naive


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(5).normal(size=(3, 5, 2, 8)).astype(np.float32)


def twin(x, bits, with_zero):
    return np.apply_along_axis(naive.asymmetric, -1, x.astype(np.float64), bits, with_zero)


def linear(inputs, outputs, input_axes, output_axes):
    return Linear(inputs, outputs, input_axes, output_axes, rngs=nnx.Rngs(params=jax.random.key(0)))


@pytest.mark.parametrize("with_zero", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_vector_is_rounded_to_its_own_range(x, bits, with_zero):
    x = x + (3.0 if bits == 4 else 0.0)  # a range without zero in it
    made = asymmetric(x, bits, with_zero=with_zero)
    np.testing.assert_allclose(made, twin(x, bits, with_zero), atol=1e-5)
    assert max(len(np.unique(vector)) for vector in np.reshape(made, (-1, 8))) <= 2**bits


def test_zeros_and_constants_are_exact():
    x = jnp.array([[0.0, 0, 0], [2.5, 2.5, 2.5], [-1.0, 0, 3.3]], jnp.float32)
    made = asymmetric(x, 2, with_zero=False)
    assert np.array_equal(made[:2], x[:2]) and made[2, 1] == 0
    assert asymmetric(x, 4, with_zero=True)[0].tolist() == [0, 0, 0]
    assert asymmetric(x.astype(jnp.bfloat16), 4, with_zero=True).dtype == jnp.bfloat16


def test_inputs_are_rounded_by_token_and_those_of_an_output_projection_by_head(x):
    fake = FakeQuantized(None, Recipe(activations=4))
    tokens = x.reshape(3, 5, 16)
    query = linear((16,), (2, 8), ("embed",), ("heads", "head_dim"))
    np.testing.assert_allclose(fake.input(tokens, query), twin(tokens, 4, True), atol=1e-5)
    out = linear((2, 8), (16,), ("heads", "head_dim"), ("embed",))
    np.testing.assert_allclose(fake.input(x, out), twin(x, 4, False), atol=1e-5)
    assert fake.input(tokens, linear((16,), (2,), ("embed",), ("heads",))) is tokens  # a rate of each head


def test_the_input_of_a_down_projection_is_rounded_in_a_rotated_basis(x):
    tokens = x.reshape(3, 5, 16)
    down = linear((16,), (4,), ("mlp",), ("embed",))
    h = hadamard(16) / 4
    made = FakeQuantized(None, Recipe(activations=4, method="had")).input(tokens, down)
    np.testing.assert_allclose(made, twin(tokens @ h, 4, True) @ h.T, atol=1e-5)
    plain = FakeQuantized(None, Recipe(activations=4)).input(tokens, down)
    np.testing.assert_allclose(plain, twin(tokens, 4, True), atol=1e-5)


def test_keys_are_rounded_in_the_basis_that_scores_do_not_see(x):
    fake = FakeQuantized(None, Recipe(cache=4))
    q, k, h = x[0], x[1], hadamard(8) / np.sqrt(8)
    np.testing.assert_allclose((q @ h) @ (k @ h).swapaxes(1, 2), q @ k.swapaxes(1, 2), atol=1e-5)
    literal = (q @ h) @ twin(k @ h, 4, True).swapaxes(1, 2)
    np.testing.assert_allclose(q @ np.asarray(fake.keys(k, None)).swapaxes(1, 2), literal, atol=1e-5)
    np.testing.assert_allclose(fake.values(k, None), twin(k, 4, False), atol=1e-5)
    rotated = FakeQuantized(None, Recipe(cache=4, method="quarot")).values(k, None)
    np.testing.assert_allclose(rotated, twin(k @ h, 4, False) @ h.T, atol=1e-5)
