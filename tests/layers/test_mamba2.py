"""Mamba-2 against its recurrence in numpy and against `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head
from layers.gated_norm import GatedRMSNorm
from layers.language_model import LanguageModel
from layers.mamba2 import Mamba2
from layers.norm import RMSNorm
from layers.stack import Stack
from maxlike.optimizers.groups import kind
from tests.reference import mamba2 as reference
from tests.reference.random import random_module

F = functools.partial
D, T = 12, 29  # no multiple of any chunk below
U_TD = np.random.default_rng(1).standard_normal((T, D)).astype(np.float32)
SEGMENTS_T = np.array([1] * 1 + [2] * 9 + [3] * 2 + [4] * 17, np.int32)
VARIANTS = {
    "one_group": F(Mamba2, heads=3, head_dim=4, state=5, chunk=8),
    "groups": F(Mamba2, head_dim=4, state=5, groups=3, conv_width=2, chunk=7, dt_limits=(0.5, 0.9)),
    "kv_heads": F(Mamba2, heads=4, head_dim=3, state=3, kv_heads=2, chunk=64),
}


@functools.cache
def build(name: str):
    graph, params, _ = random_module(lambda rngs: VARIANTS[name](D, rngs=rngs))
    return nnx.merge(graph, params), params


def rows(*segments) -> Context:
    ctx = Context.of(jnp.zeros((len(segments), T), jnp.int32))
    return ctx.replace(segments_BT=jnp.asarray(np.stack(segments)))


ONE_T = np.ones(T, np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_recurrence(name):
    layer, params = build(name)
    got, aux = jax.jit(layer.__call__)(jnp.stack([U_TD, U_TD]), rows(ONE_T, SEGMENTS_T))
    assert aux == {}
    for y_TD, segments_T in zip(got, (None, SEGMENTS_T)):
        want = reference.mamba2(
            params, U_TD, groups=layer.norm.groups, segments_T=segments_T, dt_limits=layer.dt_limits, eps=1e-5
        )
        np.testing.assert_allclose(y_TD, want, atol=1e-5)


def test_no_gradient_crosses_a_boundary():
    layer, _ = build("groups")

    def later(u_TD):
        return jnp.sum(layer(u_TD[None], rows(SEGMENTS_T))[0][0, 12:] ** 2)  # the fourth document

    gradient = np.abs(np.asarray(jax.jit(jax.grad(later))(jnp.asarray(U_TD)))).max(1)
    # Not exactly 0: what decays of earlier documents add to both ends of a difference of sums cancels up to rounding.
    assert gradient[:12].max() < 1e-6 * gradient[12:].min()


def plain(params, *, a_log: float, dt: float) -> dict:
    """Every time step is `dt`, every decay exp(-exp(a_log) dt), no skip."""
    H = len(params["D"])
    return params | {
        "dt": {"kernel": np.zeros_like(params["dt"]["kernel"])},
        "dt_bias": np.full(H, np.log(np.expm1(dt)), np.float32),
        "A_log": np.full(H, a_log, np.float32),
        "D": np.zeros(H, np.float32),
    }


def test_without_decay_and_with_unit_steps_it_is_attention_without_softmax():
    """The identity behind the mapping from attention: C is the query, B the key, x the value."""
    graph, params, _ = random_module(lambda rngs: VARIANTS["kv_heads"](D, rngs=rngs))
    layer = nnx.merge(graph, plain(params, a_log=-60.0, dt=1.0))

    @jax.jit
    def attention(u_TD):
        q, k, v = (
            jax.nn.silu(conv(linear(u_TD[None])))[0]
            for conv, linear in ((layer.C_conv, layer.C), (layer.B_conv, layer.B), (layer.x_conv, layer.x))
        )
        k, v = jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1)
        score_HTS = jnp.einsum("thn,shn->hts", q, k) * jnp.tril(jnp.ones((T, T)))
        y_TF = jnp.einsum("hts,shp->thp", score_HTS, v).reshape(T, -1)
        return layer.out(layer.norm(y_TF, layer.z(u_TD).reshape(T, -1)).reshape(T, 4, 3))

    got = jax.jit(layer.__call__)(jnp.asarray(U_TD)[None], rows(ONE_T))[0][0]
    np.testing.assert_allclose(got, attention(jnp.asarray(U_TD)), atol=1e-5)


def test_a_time_step_of_zero_leaves_the_state_alone():
    graph, params, _ = random_module(lambda rngs: VARIANTS["one_group"](D, rngs=rngs))
    bias = {"dt_bias": np.full(3, -1e4, np.float32)}
    layer = nnx.merge(graph, params | bias)
    cache = layer.init_cache(1, T, jnp.float32)
    cache["state"] = jax.random.normal(jax.random.key(0), cache["state"].shape)
    ctx = Context.of(jnp.zeros((1, T), jnp.int32), lengths_B=jnp.array([T]))
    _, after = jax.jit(layer.extend)(jnp.asarray(U_TD)[None], cache, ctx)
    np.testing.assert_array_equal(after["state"], cache["state"])


def test_the_cache_is_of_constant_size_and_its_state_float32():
    layer, _ = build("groups")
    short, long = (layer.init_cache(2, length, jnp.bfloat16) for length in (8, 8192))
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    assert short["state"].dtype == jnp.float32 and short["tail"]["x"].dtype == jnp.bfloat16


def test_initial_values():
    def made():
        return nnx.split(Mamba2(32, heads=512, head_dim=4, state=8, rngs=nnx.Rngs(params=0)))

    graph = jax.eval_shape(made)[0]
    layer = nnx.merge(graph, jax.jit(lambda: nnx.to_pure_dict(made()[1]))())
    dt = np.logaddexp(0, np.asarray(layer.dt_bias[...]))
    assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 0.1 * 1.01
    np.testing.assert_allclose(np.log(dt).mean(), np.log(0.01), atol=0.2)  # the middle of a log-uniform in [1e-3, 0.1]
    rate = np.exp(np.asarray(layer.A_log[...]))
    assert rate.min() >= 1 and rate.max() < 16 and abs(rate.mean() - 8.5) < 0.6
    np.testing.assert_array_equal(layer.D[...], 1)
    for linear, fan_in in ((layer.x, 32), (layer.B, 32), (layer.dt, 32), (layer.out, 2048)):
        kernel = np.asarray(linear.kernel[...]) * np.sqrt(fan_in)
        assert np.abs(kernel).max() <= 1
        np.testing.assert_allclose(kernel.std(), 3**-0.5, rtol=0.1)


def test_only_matrices_decay():
    _, params, axes = random_module(lambda rngs: VARIANTS["groups"](D, rngs=rngs))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    kinds = {path: kind(path, names) for path, names in zip(paths, axes, strict=True)}
    matrices = {f"{name}/kernel" for name in ("z", "x", "B", "C", "dt", "out")}
    assert {path for path, k in kinds.items() if k == "matrix"} == matrices
    assert {kinds[path] for path in kinds if path not in matrices} == {"vector"}


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"heads": 4, "expand": 2}, r"Mamba2\.heads=4 and expand=2"),
        ({"head_dim": 7}, r"Mamba2\.head_dim=7 does not divide expand \* D = 24"),
        ({"head_dim": 0}, r"Mamba2\.head_dim=0"),
        ({"heads": 0}, r"Mamba2\.heads=0"),
        ({"heads": 4, "groups": 3}, r"Mamba2\.groups=3 does not divide the 4 heads"),
        ({"heads": 4, "kv_heads": 3}, r"Mamba2\.kv_heads=3 does not divide the 4 heads"),
        ({"heads": 4, "kv_heads": 2, "groups": 2}, r"Mamba2\.groups=2 contradicts kv_heads=2"),
        ({"heads": 4, "chunk": 0}, r"Mamba2\.chunk=0"),
        ({"heads": 4, "state": 0}, r"Mamba2\.state=0"),
        ({"heads": 4, "conv_width": 0}, r"Mamba2\.conv_width=0"),
        ({"heads": 4, "dt_limits": (0.2, 0.1)}, r"Mamba2\.dt_limits=\(0\.2, 0\.1\)"),
    ],
)
def test_what_contradicts_is_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        Mamba2(D, **knobs, rngs=nnx.Rngs(params=0))


def test_the_gated_norm_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"GatedRMSNorm\.groups=5 must divide the width 12"):
        GatedRMSNorm(12, groups=5, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"GatedRMSNorm\.eps=0"):
        GatedRMSNorm(12, eps=0.0, rngs=nnx.Rngs(params=0))


VOCAB, WIDTH, LAYERS, HEADS, P, N = 40, 16, 2, 4, 8, 6


def mixer_params(weights: dict[str, np.ndarray], groups: int) -> dict:
    """The published layout, W_in and the convolution in one piece each, cut into our parts: z, x, B, C, dt."""
    inner, shared = HEADS * P, groups * N
    sizes = [inner, inner, shared, shared, HEADS]
    shapes = [(HEADS, P), (HEADS, P), (groups, N), (groups, N), (HEADS,)]
    parts = np.split(weights["in_proj.weight"].T, np.cumsum(sizes)[:-1], 1)
    z, x, b, c, dt = ({"kernel": part.reshape(WIDTH, *shape)} for part, shape in zip(parts, shapes))
    taps = np.split(weights["conv1d.weight"][:, 0].T, np.cumsum(sizes[1:3]), 1)
    biases = np.split(weights["conv1d.bias"], np.cumsum(sizes[1:3]))
    convs = [
        {"kernel": tap.reshape(-1, *shape), "bias": bias.reshape(shape)}
        for tap, bias, shape in zip(taps, biases, shapes[1:4])
    ]
    return {
        "z": z, "x": x, "B": b, "C": c, "dt": dt, "x_conv": convs[0], "B_conv": convs[1], "C_conv": convs[2],
        "dt_bias": weights["dt_bias"], "A_log": weights["A_log"], "D": weights["D"],
        "norm": {"gain": weights["norm.weight"]},
        "out": {"kernel": weights["out_proj.weight"].T.reshape(HEADS, P, WIDTH)},
    }  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_and_steps_are_those_of_transformers(groups, record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=HEADS, head_dim=P, state_size=N,
        n_groups=groups, chunk_size=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            weight.copy_(0.3 * torch.randn_like(weight) + (1.0 if gain else 0.0))
    weights = {name: weight.detach().numpy() for name, weight in theirs.state_dict().items()}
    layers = []
    for i in range(LAYERS):
        prefix = f"backbone.layers.{i}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): w for name, w in own.items() if name.startswith("mixer.")}
        layers.append({"mixer": mixer_params(mixer, groups), "mixer_norm": {"gain": own["norm.weight"]}})
    norm = F(RMSNorm, eps=1e-5)
    mixer = F(Mamba2, heads=HEADS, head_dim=P, state=N, groups=groups, chunk=8)
    graph, params, _ = random_module(
        lambda rngs: LanguageModel(
            vocab=VOCAB,
            dim=WIDTH,
            norm=norm,
            embed=Embed,
            head=F(Head, tied=False),
            stack=F(Stack, pattern=(F(Block, mixer=mixer, ffn=None, norm=norm),), depth=LAYERS, scan=True),
            rngs=rngs,
        )
    )
    params["embed"]["table"] = weights["backbone.embeddings.weight"]
    params["norm"]["gain"] = weights["backbone.norm_f.weight"]
    params["head"]["linear"]["kernel"] = weights["lm_head.weight"].T
    params["stack"]["periods"][0] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    ours = nnx.merge(graph, params)

    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 27))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
        prefill = theirs(torch.tensor(tokens[:, :21]), use_cache=True)
        stepped, cache = [], prefill.cache_params
        for t in range(21, 27):
            out = theirs(torch.tensor(tokens[:, t : t + 1]), cache_params=cache, use_cache=True)
            stepped.append(out.logits[:, 0].numpy())
    tokens = jnp.asarray(tokens)
    whole = jax.jit(lambda tokens: ours.logits(ours(tokens, Context.of(tokens)).hidden_BTD))(tokens)
    np.testing.assert_allclose(whole, want, atol=1e-4)

    @jax.jit
    def step(tokens, cache):
        hidden, cache = ours.extend(tokens, cache)
        return ours.logits(hidden), cache

    got, cache = step(tokens[:, :21], ours.init_cache(2, 32, jnp.float32))
    np.testing.assert_allclose(got, want[:, :21], atol=1e-4)
    for t, logits in zip(range(21, 27), stepped):
        got, cache = step(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(got[:, 0], logits, atol=1e-4)
    record_property(f"worst Mamba2ForCausalLM, {groups} groups", float(np.abs(np.asarray(whole) - want).max()))
