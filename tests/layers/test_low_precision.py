"""Eight bits are put under the layers that gain by them, say so, and are refused where the device has none."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes, kernels
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Head
from layers.experts import Experts
from layers.language_model import LanguageModel
from layers.linear import Linear
from layers.low_precision import EightBits, Float8, Int8, LeftAlone
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.stack import Stack

F = functools.partial
BLOCK = F(Block, mixer=F(Attention, heads=2), ffn=F(GatedMLP, width=48), norm=RMSNorm)
MODEL = F(
    LanguageModel,
    vocab=32,
    dim=32,
    stack=F(Stack, pattern=(BLOCK,), depth=2, scan=True, remat="full"),
    norm=RMSNorm,
    head=F(Head, tied=False),
)
TOKENS_BT = np.arange(24, dtype=np.int32).reshape(2, 12)


def split(products):
    return jax.eval_shape(lambda: nnx.split(products(MODEL(rngs=nnx.Rngs(params=0))), nnx.Param, axes.Buffer))


def linears(network):
    parts = jax.tree.leaves(network, is_leaf=lambda part: isinstance(part, Linear))
    return [part for part in parts if isinstance(part, Linear)]


def test_heads_and_small_matrices_are_left_alone():
    network = nnx.merge(*split(Float8(smallest=32)))
    kinds = {type(linear.product) for linear in linears(network.stack)}
    assert kinds == {EightBits}
    assert isinstance(network.head.linear.product, LeftAlone) and "vocab" in network.head.linear.product.why
    small = nnx.merge(*split(Int8(smallest=48)))
    assert {linear.product.why for linear in linears(small.stack)} == {
        "32 x 32 is below Int8.smallest=48",
        "32 x 48 is below Int8.smallest=48",
        "48 x 32 is below Int8.smallest=48",
    }
    odd = Float8(smallest=16)(GatedMLP(32, width=40, rngs=nnx.Rngs(params=0)))
    assert odd.down.product.why == "40 x 32 is no multiple of 16"


def test_experts_say_that_they_are_left_alone():
    experts = Int8()(Experts(16, count=2, width=16, rngs=nnx.Rngs(params=0)))
    kernels.forget()
    jax.eval_shape(experts, jax.ShapeDtypeStruct((2, 3, 16), jnp.float32))
    assert ("products", "compute dtype", "experts: there is no grouped product in eight bits") in kernels.report()


def test_histories_of_stacked_layers_travel_through_scan_and_remat():
    recipe = Float8(scaling="delayed", history=3, smallest=16, emulate=True)
    graph, params, buffers = jax.jit(
        lambda: nnx.split(recipe(MODEL(rngs=nnx.Rngs(params=0))), nnx.Param, axes.Buffer)
    )()
    before = nnx.to_pure_dict(buffers)["stack"]["periods"][0]
    assert before["ffn"]["up"]["product"]["history"].shape == (2, 3, 3)
    kernels.forget()

    @jax.jit
    @F(jax.grad, argnums=(0, 1))
    def gradients(params, buffers):
        model = nnx.merge(graph, params, buffers)
        hidden_BTD = model(TOKENS_BT, Context.of(TOKENS_BT)).hidden_BTD
        return jnp.sum(jnp.square(model.logits(hidden_BTD)))

    _, statistics = gradients(nnx.to_pure_dict(params), nnx.to_pure_dict(buffers))
    after = statistics["stack"]["periods"][0]
    for part in (after["mixer"]["query"], after["ffn"]["up"], after["ffn"]["down"]):
        squares, sums = part["product"]["history"][..., 0], part["product"]["history"][..., 1]
        assert sums.shape == (2, 3) and (sums > 0).all()
        np.testing.assert_allclose(squares, sums**2, rtol=1e-5)  # used once: (a^2, a)
    kernel = nnx.to_pure_dict(params)["stack"]["periods"][0]["ffn"]["up"]["kernel"]
    weight = after["ffn"]["up"]["product"]["history"][:, 1, 1]
    np.testing.assert_allclose(weight, jnp.max(jnp.abs(kernel), (1, 2)), rtol=1e-6)
    np.testing.assert_allclose(before["ffn"]["up"]["product"]["history"][:, 1, 0], -weight, rtol=1e-6)
    told = [(name, why) for op, name, why in kernels.report() if op == "products"]
    assert told == [("float8 delayed", "of Linear layers, emulated: no faster")]


def trace(products, platform=None, device=None, monkeypatch=None):
    network = products(GatedMLP(128, width=128, rngs=nnx.Rngs(params=0)))
    if device is not None:
        monkeypatch.setattr(axes, "device", lambda: types.SimpleNamespace(**device))
    x = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
    with kernels.compile_for(platform or "cpu"):
        jax.eval_shape(lambda x: network(x, Context.of(x[..., 0]))[0], x)


GPU = {"platform": "gpu", "device_kind": "NVIDIA A100"}
TPU = {"platform": "tpu"}


@pytest.mark.parametrize(
    ("products", "device", "message"),
    [
        (Float8(), None, r"Float8 \(float8 tensor\) needs a GPU or TPU and this is 'cpu': set Float8.emulate=True"),
        (Int8(), None, r"Int8 \(int8 row\) needs a GPU or TPU"),
        (Float8(), GPU | {"compute_capability": "8.0"}, "compute capability 8.9 or above and this is 'NVIDIA A100'"),
        (Float8(), GPU | {"compute_capability": "gfx90a"}, "compute capability 8.9"),
        (Float8(), GPU | {"compute_capability": "9.0"}, None),
        (Int8(), GPU | {"compute_capability": "8.0"}, None),
        (Float8(), TPU | {"device_kind": "TPU v5 lite"}, "TPU of generation 7 or above"),
        (Float8(), TPU | {"device_kind": "TPU7x"}, None),
        (Int8(), TPU | {"device_kind": "TPU v5 lite"}, None),
        (Int8(), TPU | {"device_kind": "TPU v4"}, "TPU of generation 5"),
    ],
)
def test_a_device_without_eight_bits_is_refused(products, device, message, monkeypatch):
    platform = None if device is None else device["platform"]
    if message is None:
        return trace(products, platform, device, monkeypatch)
    with pytest.raises(ValueError, match=message):
        trace(products, platform, device, monkeypatch)
    trace(type(products)(emulate=True), platform, device, monkeypatch)


def test_a_device_that_is_not_here_is_not_judged():
    trace(Float8(), "tpu")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Float8(scaling="block"), "Float8.scaling='block'"),
        (lambda: Float8(history=1), "Float8.history=1"),
        (lambda: Float8(margin=1), "Float8.margin=1"),
        (lambda: Float8(smallest=8), "Float8.smallest=8"),
        (lambda: Int8(scaling="delayed"), "Int8.scaling='delayed'"),
        (lambda: Int8(gradients="int4"), "Int8.gradients='int4'"),
        (lambda: Int8(smallest=8), "Int8.smallest=8"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
