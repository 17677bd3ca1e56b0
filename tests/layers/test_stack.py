"""Scan, unrolling and rematerialisation are one function; what differs by layer arrives where it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes, kernels
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.experts import Experts
from layers.linear_attention import LightningAttention
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.relative_attention import CrossAttention
from layers.remat import POLICIES
from layers.routers import TopK
from layers.stack import Stack, unroll, unstack
from tests.reference.random import random_module

F = functools.partial
D, T = 16, 12


class Noisy(GatedMLP):
    """A feed-forward that depends on the layer index and on the key, and reports both with a loss."""

    def __call__(self, x_BTD, ctx):
        y_BTD, _ = super().__call__(x_BTD, ctx)
        noise = jax.random.normal(ctx.key, ())
        return y_BTD * (1 + 0.1 * ctx.layer + noise), {"loss": jnp.mean(y_BTD**2), "noise": noise, "layer": ctx.layer}


FULL = F(Block, mixer=F(Attention, heads=2), ffn=F(Noisy, width=8), norm=RMSNorm)
LOCAL = F(Block, mixer=F(Attention, heads=2, window=3), ffn=F(GatedMLP, width=8), norm=RMSNorm, order="sandwich")


def split(**knobs):
    knobs = {"pattern": (FULL, LOCAL), "depth": 4} | knobs
    return random_module(lambda rngs: Stack(D, rngs=rngs, **knobs))[:2]


def build(**knobs):
    return nnx.merge(*split(**knobs))


def value_and_gradient(**knobs):
    graph, params = split(**knobs)
    x_BTD = jax.random.normal(jax.random.key(1), (2, T, D))

    @jax.jit
    def run(params):
        def loss(params):
            y_BTD, aux = nnx.merge(graph, params)(x_BTD, Context.of(x_BTD[..., 0], key=jax.random.key(2)))
            return jnp.mean(y_BTD**2) + jnp.mean(aux["loss"]), aux

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, aux), gradient = run(params)
    return {"value": value, "aux": aux, "gradient": gradient}


@pytest.fixture(scope="module")
def expected():
    return value_and_gradient(scan=False)


@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "full"), *((True, policy) for policy in POLICIES)])
def test_scan_and_remat_change_nothing(expected, scan, remat):
    got = value_and_gradient(scan=scan, remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, abs(b).max())), got, expected)


def test_layers_know_their_index_and_have_their_own_noise():
    # Layers 0 prefix, 1..4 repeated (full, local, full, local), 5 local, 6 full; only the full ones report.
    stack = build(prefix=(FULL,), suffix=(LOCAL, FULL), scan=True)
    x_BTD = jnp.ones((2, T, D))
    aux = jax.jit(lambda: stack(x_BTD, Context.of(x_BTD[..., 0], key=jax.random.key(2)))[1])()
    np.testing.assert_array_equal(aux["ffn/layer"], [0, 1, 3, 6])
    assert len(set(np.asarray(aux["ffn/noise"]).tolist())) == 4
    assert aux["loss"].shape == (4,)


@pytest.mark.large
def test_remat_keeps_less():
    x_BTD = jax.ShapeDtypeStruct((2, 64, D), jnp.float32)

    def gradient(remat):
        graph, params = split(remat=remat, scan=True, depth=16)

        def loss(params, x_BTD):
            ctx = Context.of(x_BTD[..., 0], key=jax.random.key(0))
            return jnp.mean(nnx.merge(graph, params)(x_BTD, ctx)[0])

        return loss, params

    def kept(remat):
        loss, params = gradient(remat)
        residuals = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], params, x_BTD)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    def used(remat):
        loss, params = gradient(remat)
        return jax.jit(jax.grad(loss)).lower(params, x_BTD).compile().memory_analysis().temp_size_in_bytes

    order = ["full", "branches", "matmul_half", "dots_no_batch", "dots", "none"]
    sizes = [kept(remat) for remat in order]
    assert sizes == sorted(set(sizes)), dict(zip(order, sizes))
    # What the compiler sets aside for the scanned program falls in the same order.
    assert used("full") < used("matmul_half") < used("none")


@pytest.mark.parametrize("remat", POLICIES)
def test_remat_keeps_what_a_router_chose(remat):
    moe = F(MoE, router=F(TopK, top_k=2), experts=F(Experts, count=4, width=8))
    quiet = F(Block, mixer=F(Attention, heads=2), ffn=moe, norm=RMSNorm)
    graph, params = split(pattern=(quiet,), depth=2, remat=remat, scan=True)
    x_BTD = jnp.zeros((2, T, D))

    def loss(params):
        return jnp.sum(nnx.merge(graph, params)(x_BTD, Context.of(x_BTD[..., 0]))[0])

    # Chosen once, in the forward loop: choosing anew in the backward loop could fall out otherwise.
    assert str(jax.make_jaxpr(jax.grad(loss))(params)).count("top_k[") == 1


def test_stacked_parameters_are_named_and_differ_by_layer():
    class Tiny(nnx.Module):
        def __init__(self, dim, *, rngs):
            self.w = axes.param(rngs, (dim, 2), ("embed", "mlp"))

    stack = Stack(D, pattern=(Tiny,), depth=2, prefix=(Tiny,), rngs=nnx.Rngs(params=0))
    w = stack.periods[0].w
    assert w.get_metadata("axes") == ("layers", "embed", "mlp") and w.shape == (2, D, 2)
    assert stack.prefix[0].w.get_metadata("axes") == ("embed", "mlp")
    assert not np.allclose(w[0], w[1]) and not np.allclose(w[0], stack.prefix[0].w)


@pytest.mark.parametrize(("scan", "flat"), [(True, False), (False, False), (False, True)])
def test_decoding_equals_the_whole_row(scan, flat):
    quiet = F(Block, mixer=F(Attention, heads=2), ffn=None, norm=RMSNorm)
    stack = build(pattern=(quiet, LOCAL), prefix=(quiet,), suffix=(quiet,), scan=scan)
    x_BTD = jax.random.normal(jax.random.key(1), (2, T, D))
    whole, _ = jax.jit(lambda x: stack(x, Context.of(x[..., 0])))(x_BTD)
    stack = unroll(stack) if flat else stack
    assert stack.repeats == (0 if flat else 2)
    extend = jax.jit(lambda x, cache, ctx: stack.extend(x, cache, ctx))
    cache, at = stack.init_cache(2, T, jnp.float32), 0
    for size in (8, 2, 2):
        positions_BT = jnp.broadcast_to(at + jnp.arange(size), (2, size))
        y, cache = extend(x_BTD[:, at : at + size], cache, Context(positions_BT, None))
        np.testing.assert_allclose(y, whole[:, at : at + size], atol=2e-5)
        at += size


def test_unstack_gives_back_one_stacked_gradient():
    tree = {"w": jnp.arange(6.0).reshape(3, 2), "count": jnp.arange(3)}
    slices = unstack(tree, 3)
    assert [int(s["count"]) for s in slices] == [0, 1, 2]
    gradient = jax.grad(lambda w: sum((i + 1) * jnp.sum(s["w"] ** 2) for i, s in enumerate(unstack({"w": w}, 3))))
    np.testing.assert_allclose(gradient(tree["w"]), 2 * tree["w"] * jnp.asarray([[1.0], [2.0], [3.0]]))
    primitives = str(jax.make_jaxpr(gradient)(tree["w"]))
    assert " pad[" not in primitives and "scatter" not in primitives


def test_the_backend_chooses_and_says_so():
    kernels.forget()
    stack = build(prefix=(), suffix=(), pattern=(LOCAL,))
    x = jax.ShapeDtypeStruct((2, T, D), jnp.float32)
    run = lambda x: stack(x, Context.of(x[..., 0]))[0]  # noqa: E731
    jax.eval_shape(run, x)
    with kernels.compile_for("tpu"):
        jax.eval_shape(lambda x: run(x), x)
    assert [name for op, name, _ in kernels.report() if op == "layers"] == ["unrolled", "scan"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"depth": 5}, "Stack.depth=5 must be a positive multiple of the pattern's length 2"),
        ({"depth": 0}, "Stack.depth=0"),
        ({"pattern": ()}, "Stack.pattern is empty"),
        ({"remat": "some"}, "Stack.remat='some'"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


def test_metrics_of_one_name_and_two_shapes_are_refused():
    class Wide(Noisy):
        def __call__(self, x_BTD, ctx):
            return x_BTD, {"noise": jnp.zeros(3)}

    wide = F(Block, mixer=F(Attention, heads=2), ffn=F(Wide, width=8), norm=RMSNorm)
    stack = build(prefix=(FULL,), suffix=(wide,))
    ctx = Context.of(jnp.zeros((2, T)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="layers report 'ffn/noise' in different shapes"):
        jax.eval_shape(lambda x: stack(x, ctx), jax.ShapeDtypeStruct((2, T, D), jnp.float32))


def test_a_block_that_cannot_decode_beside_the_others_is_named():
    both_ways = F(Block, mixer=F(Attention, heads=2, causal=False), ffn=None, norm=RMSNorm)
    cross = F(Block, mixer=F(CrossAttention, heads=2), ffn=None, norm=RMSNorm)
    for block, why in ((both_ways, "Attention.causal=False"), (cross, "EncoderDecoder.decoder")):
        mixed = build(prefix=(LOCAL,), pattern=(LOCAL, block))
        with pytest.raises(ValueError, match=rf"Stack\.pattern .* layer 2, a Block, .*{why}"):
            mixed.init_cache(2, T, jnp.float32)
    filled_later = build(pattern=(LOCAL, cross)).init_cache(2, T, jnp.float32, source=True)
    assert filled_later["periods"][1] == {}


def test_a_mixer_made_for_fewer_layers_is_refused():
    def lightning(**knobs):
        mixer = F(LightningAttention, heads=2, **knobs)
        return build(prefix=(LOCAL,), pattern=(F(Block, mixer=mixer, ffn=None, norm=RMSNorm),), suffix=(LOCAL,))

    with pytest.raises(ValueError, match=r"LightningAttention\.layers=5 is less than the 6 layers"):
        lightning(layers=5)
    for knobs in ({"layers": 6}, {"layers": 9}, {"layers": 1}, {"layers": 5, "decay": "none"}):
        lightning(**knobs)
