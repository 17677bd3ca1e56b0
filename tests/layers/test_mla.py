"""Latent attention against its definition and against `transformers`; its cache, its kernels, its refusals."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import kernels
from layers.attention_gate import AttentionGate
from layers.context import Context
from layers.mla import MLA
from layers.norm import RMSNorm
from layers.rope import RoPE, YaRN
from layers.rope2d import RoPE2D
from tests.reference import mla as naive
from tests.reference.attention import attention as naive_attention
from tests.reference.random import random_module

F = functools.partial
B, T, D, H, NOPE, ROPE, VALUE, RANK = 2, 12, 32, 4, 8, 4, 6, 12
INTERLEAVED = F(RoPE, layout="interleaved")
KNOBS = {
    "heads": H, "kv_rank": RANK, "nope_dim": NOPE, "rope_dim": ROPE, "value_dim": VALUE, "rope": INTERLEAVED,
}  # fmt: skip
VARIANTS = {
    "deepseek": {"query_rank": 16, "latent_norm": RMSNorm},
    "longcat": {"query_rank": 16, "latent_norm": RMSNorm, "scale_correction": True},
    "zebra": {"query_rank": 16, "kv_heads": 2},
    "plain_queries": {"latent_norm": RMSNorm, "scale_correction": True, "scale": 0.2},
}


def parts(**knobs):
    graph, params, _ = random_module(lambda rngs: MLA(D, **(KNOBS | knobs), rngs=rngs))
    return graph, params


def random_x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (B, T, D))


def call(graph, params, x_BTD, ctx=None):
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x, ctx or Context.of(x[..., 0])))(params, x_BTD)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_definition(variant):
    knobs, x_BTD = VARIANTS[variant], random_x()[:1]
    graph, params = parts(**knobs)
    frequencies = 10000.0 ** (-np.arange(0, ROPE, 2) / ROPE)

    def rotate(head_K, n):
        z = (head_K[0::2] + 1j * head_K[1::2]) * np.exp(1j * n * frequencies)
        return np.stack([z.real, z.imag], -1).reshape(-1)

    corrected = knobs.get("scale_correction", False)
    expected = naive.attention(
        np.asarray(x_BTD[0], np.float64), params, heads=H, kv_heads=knobs.get("kv_heads", H), nope=NOPE, rope=ROPE,
        scale=knobs.get("scale", (NOPE + ROPE) ** -0.5), rotate=rotate,
        query_factor=(D / 16) ** 0.5 if corrected and "query_rank" in knobs else 1.0,
        latent_factor=(D / RANK) ** 0.5 if corrected else 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(call(graph, params, x_BTD)[0][0], expected, atol=3e-5)


def test_the_cache_is_a_latent_and_a_shared_key():
    for variant in VARIANTS.values():
        module = nnx.merge(*parts(**variant))
        cache = jax.eval_shape(lambda module=module: module.init_cache(B, T, jnp.bfloat16))
        assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == B * T * (RANK + ROPE)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))


def test_latents_are_absorbed_or_expanded_with_the_same_result(monkeypatch):
    def extend(absorb):
        monkeypatch.setattr(MLA, "_absorbing_is_cheaper", lambda self, new, slots: absorb)
        module, x_BTD = nnx.merge(*parts(kv_heads=2, query_rank=16, scale_correction=True)), random_x()
        ctx = Context.of(x_BTD[..., 0], lengths_B=jnp.asarray([T, 7]))
        return jax.jit(module.extend)(x_BTD, module.init_cache(B, T, jnp.float32), ctx)

    (absorbed, cache), (expanded, same_cache) = extend(True), extend(False)
    np.testing.assert_allclose(absorbed, expanded, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache["latent"], same_cache["latent"])
    assert not np.any(cache["latent"][1, 7:])  # padding is never written


def test_published_sizes_absorb_while_decoding_and_expand_in_a_prefill():
    knobs = {"heads": 128, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128, "rope": RoPE}  # DeepSeek
    module = jax.eval_shape(lambda: MLA(7168, **knobs, query_rank=1536, rngs=nnx.Rngs(params=0)))
    assert [module._absorbing_is_cheaper(new, 4096) for new in (1, 8, 1024, 4096)] == [True, True, False, False]


@pytest.mark.parametrize("position", ["g1", "g5"])
def test_gate(position):
    knobs = {"value_dim": D // H, "kv_heads": 2}
    (graph, params), x_BTD = parts(gate=F(AttentionGate, position=position, bias=True), **knobs), random_x()
    # The output projection only joins the heads, so that both gates act on the same numbers.
    params["out"]["kernel"] = np.eye(D, dtype=np.float32).reshape(H, D // H, D)
    gate = params["gate"]["linear"]
    score = 1 / (1 + np.exp(-np.tensordot(x_BTD, gate["kernel"], 1) - gate["bias"]))
    bare = {name: value for name, value in params.items() if name != "gate"}
    y_BTD, aux = call(graph, params, x_BTD)
    expected = call(parts(**knobs)[0], bare, x_BTD)[0] * score.reshape(x_BTD.shape)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-5)
    np.testing.assert_allclose(aux["gate_mean"], score.mean(), rtol=1e-5)


def test_scale_correction_starts_queries_keys_and_values_at_unit_variance():
    x_BTD = np.random.default_rng(0).standard_normal((2, 64, 256)).astype(np.float32)
    knobs = KNOBS | {"nope_dim": 32, "rope_dim": 32, "value_dim": 64, "latent_norm": RMSNorm, "scale_correction": True}

    @jax.jit
    def variances():
        module = MLA(256, **knobs, query_rank=24, rngs=nnx.Rngs(params=0))
        positions_BT = Context.of(x_BTD[..., 0]).positions_BT
        q, (c, shared) = module._queries(x_BTD, positions_BT), module._latents(x_BTD, positions_BT)
        return [jnp.var(z) for z in (q, shared, module.key(c), module.value(c))]

    np.testing.assert_allclose(variances(), 1.0, atol=0.25)


def test_scale_correction_keeps_the_variance_of_keys():
    x_BTD = np.random.default_rng(0).standard_normal((2, 64, 256)).astype(np.float32)

    def variance(rank, corrected):
        knobs = KNOBS | {"heads": 8, "nope_dim": 32, "kv_rank": rank, "latent_norm": RMSNorm}
        # One deviation whatever the rank, as in the report; without the correction ours follows the rank.
        build = F(MLA, 256, **knobs, scale_correction=corrected)
        graph, params, _ = random_module(lambda rngs: build(rngs=rngs), std=0.02)
        params["latent_norm"]["gain"] = np.ones(rank, np.float32)
        module = nnx.merge(graph, params)
        positions_BT = Context.of(x_BTD[..., 0]).positions_BT
        return np.var(jax.jit(lambda x_BTD: module.key(module._latents(x_BTD, positions_BT)[0]))(x_BTD))

    assert variance(16, True) / variance(64, True) == pytest.approx(1.0, abs=0.1)
    assert variance(16, False) / variance(64, False) == pytest.approx(0.25, abs=0.03)


SEGMENTS = jnp.asarray(np.repeat([[1, 2, 0]], [5, 5, 2], axis=1).repeat(B, 0), jnp.int32)


@pytest.mark.parametrize("implementation", ["blocked", "chunked", "cudnn"])
@pytest.mark.parametrize("value_dim", [VALUE, 20])
def test_kernels_take_values_narrower_or_wider_than_keys(implementation, value_dim, monkeypatch):
    dot_product_attention = jax.nn.dot_product_attention

    def strict(q, k, v, *, implementation, **knobs):
        assert q.shape[3] == k.shape[3] == v.shape[3] and implementation == "cudnn"
        return dot_product_attention(q, k, v, implementation="xla", **knobs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", strict)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(key, (B, T, heads, 12)) for key, heads in zip(keys, (4, 2)))
    v, weights = (jax.random.normal(key, (B, T, heads, value_dim)) for key, heads in zip(keys[2:], (2, 4)))

    def run(function):
        def total(q, k, v):
            y = function(q, k, v, scale=0.3, causal=True, segments_BT=SEGMENTS)
            assert y.shape == weights.shape
            return jnp.sum(jnp.where(SEGMENTS[..., None, None] > 0, y * weights, 0.0))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    with kernels.choose("attention", implementation):
        got = run(kernels.attention)
    jax.tree.map(F(np.testing.assert_allclose, atol=2e-5, rtol=2e-4), got, run(naive_attention))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"kv_heads": 3}, "MLA.kv_heads=3 does not divide heads=4"),
        ({"rope_dim": 0}, "MLA.rope_dim=0 must be at least 1"),
        ({"rope_dim": 3}, "rotates 3 of 3"),
        ({"rope": RoPE2D}, "MLA.rope=RoPE2D"),
        ({"kv_rank": 33}, "MLA.kv_rank=33 must lie between 1 and 32"),
        ({"kv_rank": 15, "kv_heads": 1}, "MLA.kv_rank=15 must lie between 1 and 14"),
        ({"query_rank": 0}, "MLA.query_rank=0 must lie between 1 and 32"),
        ({"scale": 0.0}, "MLA.scale=0.0 must be positive"),
        ({"gate": F(AttentionGate, position="g2")}, "AttentionGate.position='g2' does not exist in MLA"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MLA(D, **(KNOBS | knobs), rngs=nnx.Rngs(params=0)))


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# YaRN multiplies the softmax scale, not cos and sin, where mscale equals mscale_all_dim.
MSCALE = 0.1 * np.log(4.0) + 1.0
THEIRS = {
    # family, class, its knobs, ours
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", "DeepseekV3Attention", {}, {}),
    "deepseek_v3_yarn": (
        "deepseek_v3", "DeepseekV3", "DeepseekV3Attention", {"rope_parameters": YARN},
        {
            "rope": F(
                INTERLEAVED, scaling=F(YaRN, factor=4.0, original_length=16, beta_fast=4.0, attention_factor=1.0)
            ),
            "scale": (NOPE + ROPE) ** -0.5 * MSCALE**2,
        },
    ),
    "deepseek_v2_lite": (
        "deepseek_v3", "DeepseekV3", "DeepseekV3Attention", {"q_lora_rank": None}, {"query_rank": None},
    ),
    "longcat": (
        "longcat_flash", "LongcatFlash", "LongcatFlashMLA", {},
        {"scale_correction": True, "rope": F(INTERLEAVED, base=1e7)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_equals_transformers(name, record_property):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    family, prefix, cls, theirs, ours = THEIRS[name]
    package = f"transformers.models.{family}"
    modeling = importlib.import_module(f"{package}.modeling_{family}")
    config = getattr(importlib.import_module(f"{package}.configuration_{family}"), f"{prefix}Config")(
        **{
            "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": H, "q_lora_rank": 16,
            "kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE,
            "max_position_embeddings": 64, "num_layers": 1, "num_hidden_layers": 1, "head_dim": ROPE,
        } | theirs
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = getattr(modeling, cls)(config, layer_idx=0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, weight in theirs.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if "norm" in key else 0.0))
        x = torch.randn(B, T, D)
        angles = getattr(modeling, f"{prefix}RotaryEmbedding")(config)(x, torch.arange(T)[None])
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        expected = theirs(x, position_embeddings=angles, attention_mask=mask)[0].numpy()
    w = {key: value.T for key, value in ((k, v.detach().numpy()) for k, v in theirs.state_dict().items())}
    up = w["kv_b_proj.weight"].reshape(RANK, H, NOPE + VALUE)
    down = w["kv_a_proj_with_mqa.weight"]
    query = "q_b_proj.weight" if "q_b_proj.weight" in w else "q_proj.weight"
    params = {
        "query": w[query].reshape(-1, H, NOPE + ROPE), "latent": down[:, :RANK], "shared_key": down[:, RANK:],
        "key": up[..., :NOPE], "value": up[..., NOPE:], "out": w["o_proj.weight"].reshape(H, VALUE, D),
    }  # fmt: skip
    params = {key: {"kernel": value} for key, value in params.items()}
    params["latent_norm"] = {"gain": w["kv_a_layernorm.weight"]}
    if "q_a_proj.weight" in w:
        params |= {
            "query_down": {"kernel": w["q_a_proj.weight"]},
            "query_norm": {"gain": w["q_a_layernorm.weight"]},
        }
    graph, shapes = parts(**({"query_rank": 16, "latent_norm": RMSNorm} | ours))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    got = call(graph, jax.tree.map(jnp.asarray, params), jnp.asarray(x.numpy()))[0]
    record_property(f"worst MLA of {family} ({name})", float(np.abs(np.asarray(got) - np.asarray(expected)).max()))
    np.testing.assert_allclose(got, expected, atol=1e-5)
