"""Image tokenizers: patches, locality, shapes and FLOPs of both kinds of encoder, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.codebooks import RVQ, VQEMA
from layers.image_convolutions import ConvDecoder, ConvEncoder, GroupNorm
from layers.image_tokenizer import ImageTokenizer, PatchDecoder, PatchEncoder, from_patches, to_patches
from layers.quantizers import FSQ

F = functools.partial
SIZE, FACTOR = 16, 4
KINDS = {
    "patch": (F(PatchEncoder, width=12), F(PatchDecoder, width=12)),
    "conv": (F(ConvEncoder, width=8), F(ConvDecoder, width=8)),
}


FSQ_60 = F(FSQ, levels=(5, 4, 3))


@functools.cache
def build(kind="patch", quantizer=FSQ_60, size=SIZE):
    """With its own initial values, made by one program."""
    encoder, decoder = KINDS[kind]

    def made():
        rngs = nnx.Rngs(params=0)
        return nnx.split(
            ImageTokenizer(size=size, factor=FACTOR, quantizer=quantizer, encoder=encoder, decoder=decoder, rngs=rngs)
        )

    graph = jax.eval_shape(made)[0]
    return nnx.merge(graph, jax.jit(lambda: nnx.to_pure_dict(made()[1]))())


def pictures(count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, SIZE, SIZE, 3)).astype(np.float32)


def test_patches_are_read_row_by_row():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)[:, :, :4]
    patches = to_patches(x, 2)
    np.testing.assert_array_equal(patches[1, 0, 1], x[1, :2, 2:4].ravel())
    np.testing.assert_array_equal(from_patches(patches, 2), x)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pictures_go_both_ways(kind):
    model, x = build(kind), pictures()
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, x):
        model = nnx.merge(graph, params)
        ids = model.encode(x)
        return model(x).pixels_BSSC, model(x).ids, ids, model.decode(ids), model.encoder(x)

    pixels, ids, encoded, decoded, z = run(params, x)
    assert pixels.shape == x.shape and ids.shape == (2, model.length) == (2, 16)
    np.testing.assert_array_equal(ids, encoded)
    np.testing.assert_allclose(pixels, decoded, atol=1e-4)
    assert 0.2 < np.std(z) < 3, "latents begin near unit variance, where tanh is not saturated"


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_of_the_parameters_is_computed_in(kind):
    graph, params = nnx.split(build(kind))

    @jax.jit
    def encode(params, x):
        low = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
        return low.encoder(x), nnx.merge(graph, params).encoder(x)

    def shapes(params, x):
        low = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
        return low(x).pixels_BSSC, low.decode(low.encode(x))

    z, exact = encode(params, pictures())
    pixels, decoded = jax.eval_shape(shapes, params, pictures())
    assert z.dtype == pixels.dtype == decoded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(z, np.float32), exact, atol=0.1)


def test_a_patch_sees_itself_alone():
    model, x = build(), pictures(1)
    changed, encode = x.copy(), jax.jit(model.encode)
    changed[0, 4:8, 8:12] *= -1
    ids, other = (np.asarray(encode(z))[0].reshape(4, 4) for z in (x, changed))
    np.testing.assert_array_equal(np.argwhere(ids != other), [[1, 2]])
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(model.decoder(z)[0, :4, :4])))(jnp.ones((1, 4, 4, 3)))
    assert (np.abs(gradient).sum(-1)[0] > 0).sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_compiled_products(kind):
    model = build(kind)
    graph, params = nnx.split(model)

    def run(params, z, x):
        model = nnx.merge(graph, params)
        return model.encoder(x), model.decoder(z)

    shapes = jax.eval_shape(lambda: (jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, SIZE, SIZE, 3))))
    counted = _products(jax.make_jaxpr(run)(params, *shapes).jaxpr)
    assert model.flops_per_token(16) == pytest.approx(3 * counted / 16)
    with pytest.raises(ValueError, match="16 ids a picture"):
        model.flops_per_token(17)


def _products(jaxpr) -> float:
    """FLOPs of all matrix products and convolutions."""
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars) if hasattr(v.aval, "shape")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * np.prod(shapes[-1]) * np.prod([shapes[0][axis] for axis in contracted])
        elif equation.primitive.name == "conv_general_dilated":
            total += 2 * np.prod(shapes[-1]) * np.prod(shapes[1][:3])
        for value in equation.params.values():
            inner = value.jaxpr if hasattr(value, "jaxpr") else value
            total += _products(inner) if hasattr(inner, "eqns") else 0.0
    return float(total)


def test_group_norm():
    norm = GroupNorm(16, rngs=nnx.Rngs(params=0))
    x = 3 + 2 * np.random.default_rng(0).normal(size=(2, 5, 5, 16)).astype(np.float32)
    y = np.asarray(jax.jit(norm.__call__)(x)).reshape(2, 25, 8, 2)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.var((1, 3)), 1, rtol=1e-3)
    assert norm.groups == 8 and GroupNorm(64, rngs=nnx.Rngs(params=0)).groups == 32


def test_several_books_have_an_axis_of_their_own():
    model = build(quantizer=F(RVQ, books=2, book=F(VQEMA, size=6, dim=3)))

    @jax.jit
    def run(x):
        out = model(x)
        return out.ids, out.pixels_BSSC, model.decode(out.ids)

    ids, pixels, decoded = run(pictures())
    assert ids.shape == (2, 16, 2)
    np.testing.assert_allclose(decoded, pixels, atol=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match=r"factor=4 must divide size=18"):
        build(size=18)
    with pytest.raises(ValueError, match=r"takes pictures of \[16, 16, 3\]"):
        jax.eval_shape(build().__call__, jnp.zeros((1, 20, 16, 3)))
    with pytest.raises(ValueError, match="generates nothing"):
        build().init_cache(1, 4, jnp.float32)
    with pytest.raises(ValueError, match=r"PatchEncoder\.width=0"):
        PatchEncoder(4, 3, width=0, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="power of two"):
        ConvEncoder(6, 3, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"ConvDecoder\.width"):
        ConvDecoder(4, 3, multiples=(), rngs=nnx.Rngs(params=0))
    assert np.isnan(jax.jit(build().decode)(np.full((1, 16), 60))).all(), "an unknown id is no colour"
