"""Gated DeltaNet against its recurrence in numpy and against `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.context import Context
from layers.gated_delta_net import GatedDeltaNet
from tests.reference.mamba2 import convolution, silu
from tests.reference.random import random_module

D, T, H, G, N, K, WIDTH = 12, 29, 4, 2, 6, 5, 3
X_TD = np.random.default_rng(1).standard_normal((T, D)).astype(np.float32)
SEGMENTS_T = np.array([1] * 1 + [2] * 9 + [3] * 2 + [4] * 17, np.int32)


@functools.cache
def build():
    knobs = {"heads": H, "key_heads": G, "key_dim": N, "value_dim": K, "conv_width": WIDTH, "chunk": 8}
    graph, params, _ = random_module(lambda rngs: GatedDeltaNet(D, **knobs, rngs=rngs))
    return nnx.merge(graph, params), params


def naive(params, x_TD, segments_T):
    """One token after the other, as the docstring of the layer has it, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def convolved(name):
        kernel, taps = p[name]["kernel"], p[f"{name}_conv"]["kernel"]
        pre = np.einsum("td,dhn->thn", x_TD, kernel).reshape(T, -1)
        return silu(convolution(pre, taps.reshape(len(taps), -1), None, segments_T)).reshape(T, *kernel.shape[1:])

    q, k, v = convolved("query"), convolved("key"), convolved("value")
    q, k = (np.repeat(a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6), H // G, 1) for a in (q, k))
    q = q / np.sqrt(N)
    decay = np.exp(-np.exp(p["A_log"]) * np.log1p(np.exp(x_TD @ p["decay"]["kernel"] + p["dt_bias"])))
    beta = 1 / (1 + np.exp(-x_TD @ p["beta"]["kernel"]))
    z = np.einsum("td,dhk->thk", x_TD, p["gate"]["kernel"])
    out, state = np.zeros((T, H, K)), np.zeros((H, N, K))
    for t in range(T):
        if t and segments_T[t] != segments_T[t - 1]:
            state[:] = 0
        for h in range(H):
            state[h] *= decay[t, h]
            state[h] += beta[t, h] * np.outer(k[t, h], v[t, h] - k[t, h] @ state[h])
            y = q[t, h] @ state[h]
            out[t, h] = y / np.sqrt(np.mean(y**2) + 1e-6) * p["norm"]["gain"] * silu(z[t, h])
    return np.einsum("thk,hkd->td", out, p["out"]["kernel"])


def test_it_is_the_recurrence():
    layer, params = build()
    segments_BT = np.stack([np.ones(T, np.int32), SEGMENTS_T])
    ctx = Context.of(jnp.zeros((2, T), jnp.int32)).replace(segments_BT=jnp.asarray(segments_BT))
    got, aux = jax.jit(layer.__call__)(jnp.stack([X_TD, X_TD]), ctx)
    assert aux == {}
    for y_TD, segments_T in zip(got, segments_BT):
        np.testing.assert_allclose(y_TD, naive(params, X_TD, segments_T), atol=2e-5)


def test_initial_values():
    build = functools.partial(GatedDeltaNet, 8, heads=512, key_heads=1, key_dim=4, value_dim=2)
    initial = jax.jit(lambda: nnx.to_pure_dict(nnx.split(build(rngs=nnx.Rngs(params=0)))[1]))()
    rate = np.exp(np.asarray(initial["A_log"]))
    assert rate.min() >= 0.01 and rate.max() < 16 and abs(rate.mean() - 8) < 0.8
    np.testing.assert_array_equal(initial["dt_bias"], 1)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"heads": 4, "key_heads": 3}, r"GatedDeltaNet\.key_heads=3 does not divide heads=4"),
        ({"heads": 0}, r"GatedDeltaNet\.key_heads=None does not divide heads=0"),
        ({"heads": 4, "key_dim": 0}, r"GatedDeltaNet\.key_dim=0"),
        ({"heads": 4, "value_dim": -1}, r"GatedDeltaNet\.value_dim=-1"),
        ({"heads": 4, "conv_width": 0}, r"GatedDeltaNet\.conv_width=0"),
        ({"heads": 4, "chunk": 0}, r"GatedDeltaNet\.chunk=0"),
    ],
)
def test_what_contradicts_is_refused(knobs, says):
    with pytest.raises(ValueError, match=says):
        GatedDeltaNet(D, **knobs, rngs=nnx.Rngs(params=0))


def params_of(weights: dict[str, np.ndarray]) -> dict:
    """The published layout: one projection whose rows go by key head, each with its q, k, values and gates."""
    R = H // G
    q, k, v, z = np.split(weights["in_proj_qkvz.weight"].T.reshape(D, G, -1), [N, 2 * N, 2 * N + R * K], 2)
    beta, decay = np.split(weights["in_proj_ba.weight"].T.reshape(D, G, -1), 2, 2)
    taps = np.split(weights["conv1d.weight"][:, 0].T, [G * N, 2 * G * N], 1)
    query_conv, key_conv, value_conv = (
        {"kernel": tap.reshape(WIDTH, *shape)} for tap, shape in zip(taps, [(G, N), (G, N), (H, K)])
    )
    return {
        "query": {"kernel": q}, "key": {"kernel": k},
        "value": {"kernel": v.reshape(D, H, K)}, "gate": {"kernel": z.reshape(D, H, K)},
        "beta": {"kernel": beta.reshape(D, H)}, "decay": {"kernel": decay.reshape(D, H)},
        "query_conv": query_conv, "key_conv": key_conv, "value_conv": value_conv,
        "dt_bias": weights["dt_bias"], "A_log": weights["A_log"],
        "norm": {"gain": weights["norm.weight"]},
        "out": {"kernel": weights["out_proj.weight"].T.reshape(H, K, D)},
    }  # fmt: skip


def test_it_is_the_layer_of_transformers(record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = transformers.Qwen3NextConfig(
        hidden_size=D, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_value_heads=H,
        linear_num_key_heads=G, linear_key_head_dim=N, linear_value_head_dim=K, linear_conv_kernel_dim=WIDTH,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.Qwen3NextGatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(0.3 * torch.randn_like(weight) + (1.0 if name == "norm.weight" else 0.0))
    layer, _ = build()
    graph, _ = nnx.split(layer)
    ours = nnx.merge(graph, params_of({name: weight.detach().numpy() for name, weight in theirs.state_dict().items()}))

    x_1TD, cut = X_TD[None], 21
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        want = theirs(torch.tensor(x_1TD)).numpy()
        stepped = [theirs(torch.tensor(x_1TD[:, :cut]), cache_params=cache)]
        stepped += [theirs(torch.tensor(x_1TD[:, t : t + 1]), cache_params=cache) for t in range(cut, T)]
    np.testing.assert_allclose(torch.cat(stepped, 1).numpy(), want, atol=1e-5)
    whole = jax.jit(ours.__call__)(jnp.asarray(x_1TD), Context.of(jnp.zeros((1, T))))[0]
    np.testing.assert_allclose(whole, want, atol=2e-5)

    extend = jax.jit(ours.extend)
    cache, pieces = ours.init_cache(1, T, jnp.float32), []
    for first, last in [(0, cut), *((t, t + 1) for t in range(cut, T))]:
        ctx = Context(jnp.arange(first, last)[None], None, jnp.array([last - first]))
        y, cache = extend(jnp.asarray(x_1TD[:, first:last]), cache, ctx)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), want, atol=2e-5)
    record_property("worst Qwen3NextGatedDeltaNet", float(np.abs(np.asarray(whole) - want).max()))
