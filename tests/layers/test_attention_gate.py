"""Gated attention against its definition at every position, and against `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.attention_gate import AttentionGate
from layers.context import Context
from layers.norm import RMSNorm
from layers.rope import RoPE
from tests.reference.attention import attention as naive
from tests.reference.random import random_module

F = functools.partial
B, T, D, H, G, K = 2, 10, 32, 4, 2, 8
HEADS = {"heads": H, "kv_heads": G, "head_dim": K, "rope": RoPE, "qk_norm": RMSNorm}
ACTIVATIONS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "ns_sigmoid": lambda x: 0.5 + 0.5 / (1 + np.exp(-x)),
    "identity": lambda x: x,
}
# Each value of each knob, and each position with both granularities where it has them.
CASES = {
    "g1": {},
    "g1_headwise": {"granularity": "headwise"},
    "g1_added": {"mode": "add", "activation": "silu"},
    "g1_learned": {"input_dependent": False},
    "g1_shared": {"head_shared": True},
    "g2": {"position": "g2", "activation": "silu"},
    "g2_shared_added": {"position": "g2", "head_shared": True, "mode": "add", "activation": "identity"},
    "g3": {"position": "g3", "activation": "ns_sigmoid"},
    "g3_headwise": {"position": "g3", "granularity": "headwise"},
    "g4": {"position": "g4", "bias": True},
    "g5": {"position": "g5"},
    "g5_learned": {"position": "g5", "input_dependent": False, "activation": "silu"},
}


def parts(**gate):
    graph, params, _ = random_module(lambda rngs: Attention(D, **HEADS, gate=F(AttentionGate, **gate), rngs=rngs))
    return graph, params


@pytest.fixture(scope="module")
def x_BTD():
    return jax.random.normal(jax.random.key(0), (B, T, D))


def call(graph, params, x_BTD, ctx=None):
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x, ctx or Context.of(x[..., 0])))(params, x_BTD)


def scores_by_hand(gate, params, x_BTD) -> np.ndarray:
    """What spreads over Y, a head at a time."""
    act = ACTIVATIONS[gate.get("activation", "sigmoid")]
    if not gate.get("input_dependent", True):
        return act(np.asarray(params["gate"]["logits"]))[None, None]
    w = params["gate"]["linear"]
    bias = w["bias"] if "bias" in w else np.zeros(w["kernel"].shape[1:], np.float32)
    if gate.get("position") == "g5":
        return act(np.asarray(x_BTD) @ w["kernel"] + bias)
    heads = [act(np.asarray(x_BTD) @ w["kernel"][:, h].reshape(D, -1) + bias[h]) for h in range(w["kernel"].shape[1])]
    return np.stack([sum(heads) / len(heads)] * len(heads) if gate.get("head_shared") else heads, 2)


@functools.cache
def ungated():
    """Programs that all cases share: queries and keys before RoPE with values; RoPE and attention; the output."""
    graph = random_module(lambda rngs: Attention(D, **HEADS, rngs=rngs))[0]

    def project(params, x_BTD):
        bare = nnx.merge(graph, params)
        return bare.query_norm(bare.query(x_BTD)), bare.key_norm(bare.key(x_BTD)), bare.value(x_BTD)

    def attend(params, q, k, v):
        rope, positions_BT = nnx.merge(graph, params).rope, Context.of(jnp.zeros((B, T))).positions_BT
        return naive(rope(q, positions_BT), rope(k, positions_BT), v, scale=K**-0.5, causal=True)

    return jax.jit(project), jax.jit(attend), jax.jit(lambda params, y: nnx.merge(graph, params).out(y))


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition_and_decodes(name, x_BTD):
    gate = CASES[name]
    graph, params = parts(**gate)
    bare = {key: value for key, value in params.items() if key != "gate"}
    score, position = scores_by_hand(gate, params, x_BTD), gate.get("position", "g1")

    def at(place, y):
        if place != position:
            return y
        return y + score if gate.get("mode") == "add" else y * score

    project, attend, project_out = ungated()
    q, k, v = (np.asarray(z) for z in project(bare, x_BTD))
    y = at("g1", np.asarray(attend(bare, at("g4", q), at("g3", k), at("g2", v))))
    expected = at("g5", np.asarray(project_out(bare, y)))
    whole, aux = call(graph, params, x_BTD)
    np.testing.assert_allclose(whole, expected, atol=2e-5)
    np.testing.assert_allclose(aux["gate_mean"], score.mean(), rtol=1e-4)
    if position not in ("g1", "g2"):  # those are in the contract
        module, out = nnx.merge(graph, params), []
        cache, extend = module.init_cache(B, T, jnp.float32), jax.jit(module.extend)
        for at_T in (0, 5):
            ctx = Context(np.tile(np.arange(at_T, at_T + 5), (B, 1)), None, np.full(B, 5))
            y_BTD, cache = extend(x_BTD[:, at_T : at_T + 5], cache, ctx)
            out.append(y_BTD)
        np.testing.assert_allclose(np.concatenate(out, 1), whole, atol=1e-5)


def test_open_half_open_and_closed_gates(x_BTD):
    bare_graph, bare, _ = random_module(lambda rngs: Attention(D, **HEADS, rngs=rngs))
    ungated = call(bare_graph, bare, x_BTD)[0]
    graph = parts(input_dependent=False)[0]
    for logit, share in ((30.0, 1.0), (0.0, 0.5), (-30.0, 0.0)):
        y_BTD = call(graph, bare | {"gate": {"logits": np.full((H, K), logit, np.float32)}}, x_BTD)[0]
        np.testing.assert_allclose(y_BTD, share * ungated, atol=1e-6)
    assert (
        float(jnp.abs(AttentionGate(D, H, G, K, input_dependent=False, rngs=nnx.Rngs(params=0)).logits[...]).max()) == 0
    )


def test_tied_elementwise_gates_are_headwise_ones(x_BTD):
    graph, params = parts(granularity="headwise")
    kernel_DH = params["gate"]["linear"]["kernel"]
    tied = params | {"gate": {"linear": {"kernel": np.repeat(kernel_DH[:, :, None], K, 2)}}}
    np.testing.assert_allclose(call(parts()[0], tied, x_BTD)[0], call(graph, params, x_BTD)[0], atol=1e-5)


def test_the_gate_trains(x_BTD):
    graph, params = parts()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(x_BTD, Context.of(x_BTD[..., 0]))[0] ** 2)))
    assert float(jnp.abs(gradient(params)["gate"]["linear"]["kernel"]).min(0).max()) > 0


def test_metrics_are_shares_of_the_real_tokens(x_BTD):
    graph, params = parts(granularity="headwise")
    real_BT = np.arange(T)[None] < np.array([[7], [3]])
    _, aux = call(graph, params, x_BTD, Context.of(x_BTD[..., 0], segments_BT=jnp.asarray(real_BT, jnp.int32)))
    score = scores_by_hand({"granularity": "headwise"}, params, x_BTD)[real_BT]
    expected = {
        "gate_mean": score.mean(),
        "gate_below_0.1": (score < 0.1).mean(),
        "gate_below_0.5": (score < 0.5).mean(),
    }
    assert aux.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(aux[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"position": "g6"}, "AttentionGate.position='g6' must be one of g1, g2"),
        ({"activation": "tanh"}, "AttentionGate.activation='tanh'"),
        ({"position": "g5", "granularity": "headwise"}, "granularity='headwise' with position='g5' has no heads"),
        ({"position": "g5", "head_shared": True}, "head_shared=True with position='g5' has no heads"),
        ({"head_shared": True, "granularity": "headwise"}, "leaves one number"),
        ({"bias": True, "input_dependent": False}, "AttentionGate.bias=True needs input_dependent=True"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(ValueError, match=message):
        AttentionGate(D, H, G, K, **knobs, rngs=nnx.Rngs(params=0))


def test_an_added_sigmoid_warns():
    with pytest.warns(UserWarning, match="can only add"):
        AttentionGate(D, H, G, K, mode="add", rngs=nnx.Rngs(params=0))


def test_equals_transformers(x_BTD, record_property):
    torch = pytest.importorskip("torch")
    qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen3_next.Qwen3NextConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=G, head_dim=K, attention_bias=True,
        attn_implementation="eager", rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = qwen3_next.Qwen3NextAttention(config, layer_idx=0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
        x = torch.tensor(np.asarray(x_BTD))
        angles = qwen3_next.Qwen3NextRotaryEmbedding(config)(x, torch.arange(T)[None])
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        expected = theirs(x, position_embeddings=angles, attention_mask=mask)[0].numpy()
    w = {name: weight.detach().numpy().T for name, weight in theirs.state_dict().items()}

    def linear(name, *shape):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return {"kernel": weight.reshape(-1, *shape), "bias": bias.reshape(shape)}

    both = linear("q_proj", H, 2 * K)  # each head: K rows of the query, K of the gate
    params = {
        "query": {name: z[..., :K] for name, z in both.items()},
        "gate": {"linear": {name: z[..., K:] for name, z in both.items()}},
        "key": linear("k_proj", G, K),
        "value": linear("v_proj", G, K),
        "out": {"kernel": w["o_proj.weight"].reshape(H, K, D), "bias": w["o_proj.bias"]},
        "query_norm": {"gain": 1 + w["q_norm.weight"]},  # their gains count from 1
        "key_norm": {"gain": 1 + w["k_norm.weight"]},
    }
    knobs = HEADS | {"rope": F(RoPE, fraction=0.5), "qkv_bias": True, "out_bias": True}
    graph, shapes, _ = random_module(lambda rngs: Attention(D, **knobs, gate=F(AttentionGate, bias=True), rngs=rngs))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    got = call(graph, params, x_BTD)[0]
    record_property("worst Qwen3NextAttention", float(np.abs(np.asarray(got) - np.asarray(expected)).max()))
    np.testing.assert_allclose(got, expected, atol=1e-5)
