"""Rotary embedding: its defining properties, its layouts and its scalings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.rope import LinearScaling, Llama3Scaling, NTKScaling, RoPE, YaRN

X = jax.random.normal(jax.random.key(0), (2, 6, 3, 16))
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 5], [7, 8, 9, 0, 1, 2]])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_is_a_complex_rotation_of_pairs(layout, fraction):
    rope = RoPE(16, base=100.0, layout=layout, fraction=fraction)
    n = int(16 * fraction)
    x = np.asarray(X)
    pairs = (x[..., : n // 2], x[..., n // 2 : n]) if layout == "half" else (x[..., 0:n:2], x[..., 1:n:2])
    angle = np.asarray(POSITIONS)[:, :, None, None] * 100.0 ** (-np.arange(0, n, 2) / n)
    turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)
    y = np.asarray(rope(X, POSITIONS))
    got = (y[..., : n // 2], y[..., n // 2 : n]) if layout == "half" else (y[..., 0:n:2], y[..., 1:n:2])
    np.testing.assert_allclose(got[0], turned.real, atol=1e-5)
    np.testing.assert_allclose(got[1], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(y[..., n:], x[..., n:])


def test_scores_depend_on_the_distance_alone():
    rope = RoPE(16)
    score = lambda shift: jnp.einsum("bthk,bshk->bhts", rope(X, POSITIONS + shift), rope(X, POSITIONS + shift))  # noqa: E731
    np.testing.assert_allclose(score(0), score(1000), atol=2e-3)


def test_the_gradient_is_the_rotation_back():
    rope = RoPE(16, layout="interleaved", fraction=0.5, scaling=functools.partial(YaRN, factor=4.0, original_length=8))
    y, pull = jax.vjp(lambda x: rope(x, POSITIONS), X)
    g = jax.random.normal(jax.random.key(1), y.shape)
    # The map is linear, so its derivative along e is the map at e: <g, f(e)> = <pull(g), e>.
    e = jax.random.normal(jax.random.key(2), X.shape)
    np.testing.assert_allclose(jnp.vdot(g, rope(e, POSITIONS)), jnp.vdot(pull(g)[0], e), rtol=1e-5)


def test_linear_scaling_is_a_slower_clock():
    scaled = RoPE(16, scaling=functools.partial(LinearScaling, factor=2.0))
    np.testing.assert_allclose(scaled(X, POSITIONS * 2), RoPE(16)(X, POSITIONS), atol=1e-5)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    plain, _ = RoPE(16).frequencies()
    scaled, _ = RoPE(16, scaling=functools.partial(NTKScaling, factor=4.0)).frequencies()
    np.testing.assert_allclose(plain / scaled, 4.0 ** (np.arange(8) / 7))


def test_yarn_ends_and_attention_factor():
    plain, _ = RoPE(64).frequencies()
    scaled, factor = RoPE(64, scaling=functools.partial(YaRN, factor=4.0, original_length=2048)).frequencies()
    turns = 2048 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.7], plain[turns < 0.7] / 4)
    assert np.all(np.diff(plain / scaled) >= 0) and factor == pytest.approx(0.1 * np.log(4) + 1)
    y = RoPE(64, scaling=functools.partial(YaRN, factor=4.0, original_length=2048, attention_factor=2.0))
    x = jnp.ones((1, 1, 1, 64))
    np.testing.assert_allclose(y(x, jnp.zeros((1, 1), jnp.int32)), 2.0)


def test_llama3_blends_between_wavelengths():
    plain, _ = RoPE(128, base=500000.0).frequencies()
    scaling = functools.partial(Llama3Scaling, factor=8.0, original_length=8192)
    scaled, _ = RoPE(128, base=500000.0, scaling=scaling).frequencies()
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)


def test_equal_knobs_are_equal_values():
    make = lambda factor: RoPE(16, scaling=functools.partial(LinearScaling, factor=factor))  # noqa: E731
    assert make(2.0) == make(2.0) != make(3.0) and hash(make(2.0)) == hash(make(2.0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RoPE(16, fraction=0.0), "RoPE.fraction=0.0"),
        (lambda: RoPE(10, fraction=0.5), "rotates 5 of 10"),
        (lambda: RoPE(16, base=0.0), "RoPE.base=0.0"),
        (lambda: RoPE(16, layout="whole"), "RoPE.layout='whole'"),
        (lambda: LinearScaling(factor=0.5), "LinearScaling.factor=0.5"),
        (lambda: YaRN(factor=2.0, original_length=8, beta_fast=1.0, beta_slow=1.0), "YaRN.beta_fast=1.0"),
        (lambda: YaRN(factor=2.0, original_length=0), "YaRN.original_length=0"),
        (lambda: Llama3Scaling(factor=2.0, original_length=-8), "Llama3Scaling.original_length=-8"),
        (lambda: Llama3Scaling(factor=2.0, original_length=8, high_frequency_factor=1.0), "high_frequency_factor=1.0"),
        (lambda: RoPE(2, scaling=functools.partial(NTKScaling, factor=2.0)).frequencies(), "more than 2 rotated"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
