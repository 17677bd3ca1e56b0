"""Each linear mixer against its paper's equations in numpy, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.delta_net import DeltaNet
from layers.embed import Embed
from layers.gated_linear_attention import GatedLinearAttention
from layers.language_model import LanguageModel
from layers.linear_attention import LightningAttention, SimpleRMSNorm, alibi_slopes
from layers.lrpe import LRPE
from layers.mla import MLA
from layers.mlp import GatedMLP
from layers.retention import Retention
from layers.rope import RoPE
from layers.rope2d import RoPE2D
from layers.stack import Stack
from tests.reference import recurrence as naive
from tests.reference.random import random_module

D, B, T, H = 16, 2, 21, 4


def built(part, **knobs):
    """(mixer, its parameters in numpy float64) with random parameters."""
    graph, params, _ = random_module(lambda rngs: part(D, **knobs, rngs=rngs))
    return nnx.merge(graph, params), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def output(mixer, x_BTD, ctx) -> jax.Array:
    return jax.jit(mixer.__call__)(x_BTD, ctx)[0]


def row() -> tuple[np.ndarray, Context]:
    x_BTD = np.random.default_rng(3).standard_normal((B, T, D)).astype(np.float32)
    return x_BTD, Context.of(jnp.zeros((B, T)))


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, gain=1.0):
    return gain * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)


def heads(x_BTD, kernel_DHK):
    return np.einsum("btd,dhk->bthk", x_BTD.astype(np.float64), kernel_DHK)


def out(y_BTHK, p):
    return np.einsum("bthk,hkd->btd", y_BTHK, p["out"]["kernel"])


@pytest.mark.parametrize("lrpe", [None, LRPE], ids=["plain", "lrpe"])
@pytest.mark.parametrize("decay", ["alibi", "paper_linear", "none"])
def test_lightning_is_the_parallel_form_of_the_paper(decay, lrpe):
    layer, layers = 1, 3
    mixer, p = built(LightningAttention, heads=H, layers=layers, decay=decay, lrpe=lrpe, chunk=8)
    x_BTD, ctx = row()
    q, k = silu(heads(x_BTD, p["query"]["kernel"])), silu(heads(x_BTD, p["key"]["kernel"]))
    v, u = heads(x_BTD, p["value"]["kernel"]), heads(x_BTD, p["gate"]["kernel"])
    lag_TS = np.arange(T)[:, None] - np.arange(T)
    slopes_H = {
        "alibi": np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * (1 - 1 / 2 + 1e-5),
        "paper_linear": np.array([0, 2, 4, 6]) * (1 - 1 / 3),
        "none": np.zeros(H),
    }[decay]
    mask_HTS = np.where(lag_TS >= 0, np.exp(-slopes_H[:, None, None] * np.maximum(lag_TS, 0)), 0)
    if lrpe is None:
        scores = np.einsum("bthk,bshk->bhts", q, k)
    else:
        theta = 10000.0 ** (-2 * np.arange(D) / D).reshape(H, D // H) + p["lrpe"]["offset"]
        turn = np.cos(theta * lag_TS[..., None, None])
        scores = np.einsum("bthk,bshk,tshk->bhts", q, k, turn)
    o = np.einsum("bhts,bshk->bthk", scores * mask_HTS, v)
    expected = out(rms(o.reshape(B, T, D)).reshape(o.shape) * u, p)
    got = output(mixer, x_BTD, ctx.replace(layer=jnp.int32(layer)))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_slopes():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    # Six heads: the four of H = 4, then every other one of H = 8.
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_decay_weakens_with_depth():
    for layers, layer, scale in ((1, 0, 1.0), (5, 0, 1.00001), (5, 2, 0.50001), (5, 4, 1e-5)):
        mixer, _ = built(LightningAttention, heads=H, layers=layers)
        np.testing.assert_allclose(mixer.log_decay(jnp.int32(layer)), -alibi_slopes(H) * scale, rtol=1e-3)


def test_lrpe_is_the_cosine_of_the_distance():
    q, k = np.random.default_rng(0).standard_normal((2, 1, T, H, 4))
    lrpe = LRPE(H, 4, rngs=nnx.Rngs(params=0))
    positions_BT = jnp.arange(T)[None]
    a, b = lrpe(jnp.asarray(q, jnp.float32), positions_BT), lrpe(jnp.asarray(k, jnp.float32), positions_BT)
    got = np.einsum("bthk,bshk->bhts", a, b)
    turn = np.cos(np.asarray(lrpe.theta()) * (np.arange(T)[:, None] - np.arange(T))[..., None, None])
    np.testing.assert_allclose(got, np.einsum("bthk,bshk,tshk->bhts", q, k, turn), atol=5e-6)


def test_retention_is_the_paper():
    mixer, p = built(Retention, heads=H, chunk=8)
    x_BTD, ctx = row()
    q, k, v, g = (heads(x_BTD, p[name]["kernel"]) for name in ("query", "key", "value", "gate"))
    q, k = (np.asarray(RoPE(D // H)(jnp.asarray(z, jnp.float32), ctx.positions_BT)) for z in (q, k))
    log_decay = np.log(1 - 2.0 ** (-5 - np.arange(H)))
    o, _ = naive.recurrence(q * (D // H) ** -0.5, k, v, log_decay=log_decay)
    expected = out(silu(g) * rms(o), p)
    np.testing.assert_allclose(output(mixer, x_BTD, ctx), expected, atol=2e-5 * np.abs(expected).max())


def test_gated_linear_attention_is_the_paper():
    mixer, p = built(GatedLinearAttention, heads=H, rank=4, chunk=8)
    x_BTD, ctx = row()
    q, k, v, g = (heads(x_BTD, p[name]["kernel"]) for name in ("query", "key", "value", "gate"))
    gate = heads(x_BTD @ p["decay_in"]["kernel"], p["decay_out"]["kernel"]) + p["decay_out"]["bias"]
    o, _ = naive.recurrence(q * (D // 2 // H) ** -0.5, k, v, log_decay=-np.log1p(np.exp(-gate)) / 16)
    expected = out(silu(g) * rms(o, p["norm"]["gain"]), p)
    np.testing.assert_allclose(output(mixer, x_BTD, ctx), expected, atol=2e-5 * np.abs(expected).max())


def test_delta_net_is_the_paper():
    mixer, p = built(DeltaNet, heads=H, conv_width=3, chunk=8)
    x_BTD, ctx = row()

    def short(name):
        z = np.pad(heads(x_BTD, p[name]["kernel"]), ((0, 0), (2, 0), (0, 0), (0, 0)))
        taps = p[f"{name}_conv"]["kernel"]
        return silu(sum(taps[j] * z[:, j : j + T] for j in range(3)))

    q, k, v = short("query"), short("key"), short("value")
    q, k = (z / np.sqrt(np.sum(z**2, -1, keepdims=True) + 1e-6) for z in (q, k))
    beta = 1 / (1 + np.exp(-np.einsum("btd,dh->bth", x_BTD, p["beta"]["kernel"])))
    o, _ = naive.recurrence(q * (D // H) ** -0.5, k, v, beta=beta)
    expected = out(rms(o, p["norm"]["gain"]), p)
    np.testing.assert_allclose(output(mixer, x_BTD, ctx), expected, atol=3e-5 * np.abs(expected).max())


def test_a_network_of_them_decodes_as_it_trains():
    # TransNormerLLM: LRPE in the first layer alone, decays weaker with depth, SGLU, SimpleRMSNorm, scaled embedding.
    mixer = functools.partial(LightningAttention, heads=H, layers=3, chunk=8)
    ffn = functools.partial(GatedMLP, width=24, activation="identity")
    block = functools.partial(Block, ffn=ffn, norm=SimpleRMSNorm)
    stack = functools.partial(
        Stack,
        prefix=(functools.partial(block, mixer=functools.partial(mixer, lrpe=LRPE)),),
        pattern=(functools.partial(block, mixer=mixer),),
        depth=2,
        scan=True,
        remat="full",
    )
    embed = functools.partial(Embed, scale=D**0.5)
    graph, params, _ = random_module(
        lambda rngs: LanguageModel(vocab=11, dim=D, stack=stack, norm=SimpleRMSNorm, embed=embed, rngs=rngs)
    )
    model = nnx.merge(graph, params)
    tokens_BT = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)
    whole = jax.jit(lambda tokens_BT: model(tokens_BT, Context.of(tokens_BT)).hidden_BTD)(tokens_BT)
    cache, parts, extend = model.init_cache(B, T, jnp.float32), [], jax.jit(model.extend)
    for begin, end in ((0, 10), (10, 11), (11, T)):
        hidden_BTD, cache = extend(tokens_BT[:, begin:end], cache)
        parts.append(hidden_BTD)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(cache["stack"])) == B * (2 + 1 + 1) * D * D // H


def test_the_cache_does_not_grow():
    for part, count in (
        (functools.partial(LightningAttention, heads=H), H * 4 * 4),
        (functools.partial(LightningAttention, heads=H, lrpe=LRPE), H * 8 * 4),
        (functools.partial(Retention, heads=H), H * 4 * 8),
        (functools.partial(GatedLinearAttention, heads=H), H * 2 * 4),
        (functools.partial(DeltaNet, heads=H, conv_width=4), H * 4 * 4 + 3 * 3 * D),
    ):
        mixer, _ = built(part)
        for length in (1, 10**6):
            assert sum(leaf.size for leaf in jax.tree.leaves(mixer.init_cache(1, length, jnp.bfloat16))) == count


@pytest.mark.parametrize(
    ("part", "knobs", "word"),
    [
        (LightningAttention, {"heads": 3}, "heads=3"),
        (LightningAttention, {"heads": 4, "chunk": 0}, "chunk=0"),
        (LightningAttention, {"heads": 4, "layers": 0}, "layers=0"),
        (LightningAttention, {"heads": 4, "decay": "learned"}, "decay='learned'"),
        (LightningAttention, {"heads": 4, "features": "relu"}, "features='relu'"),
        (LightningAttention, {"heads": 4, "lrpe": functools.partial(LRPE, base=0.0)}, "base=0.0"),
        (LightningAttention, {"heads": 4, "lrpe": RoPE}, "LightningAttention.lrpe .* use LRPE"),
        (Retention, {"heads": 4, "rope": LRPE}, "Retention.rope .* use RoPE"),
        (Retention, {"heads": 4, "rope": RoPE2D}, "Retention.rope=RoPE2D"),
        (Attention, {"heads": 4, "rope": LRPE}, "Attention.rope .* use RoPE"),
        (MLA, {"heads": 4, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 4, "rope": LRPE}, "MLA.rope"),
        (Retention, {"heads": 5}, "heads=5"),
        (Retention, {"heads": 16}, "rotates 1"),
        (Retention, {"heads": 4, "value_ratio": 0}, "value_ratio=0"),
        (GatedLinearAttention, {"heads": 16}, "heads=16"),
        (GatedLinearAttention, {"heads": 4, "temperature": 0.0}, "temperature=0.0"),
        (GatedLinearAttention, {"heads": 4, "rank": 0}, "rank=0"),
        (DeltaNet, {"heads": 3}, "heads=3"),
        (DeltaNet, {"heads": 4, "chunk": -1}, "chunk=-1"),
    ],
)
def test_bad_knobs_are_named(part, knobs, word):
    with pytest.raises(ValueError, match=word):
        built(part, **knobs)


def test_layers_need_to_know_which_they_are():
    mixer, _ = built(LightningAttention, heads=H, layers=3)
    with pytest.raises(ValueError, match="layers=3"):
        mixer(*row())
