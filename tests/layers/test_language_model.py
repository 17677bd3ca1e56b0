"""The whole network: embeddings, head, padding of the vocabulary, decoding of unequal rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.stack import Stack
from tests.reference.random import random_module

F = functools.partial
BLOCK = F(Block, mixer=F(Attention, heads=2, rope=RoPE), ffn=F(GatedMLP, width=24), norm=RMSNorm)
TOKENS = jax.random.randint(jax.random.key(1), (3, 10), 0, 50)


def build(**knobs):
    knobs = {"vocab": 50, "dim": 16, "stack": F(Stack, pattern=(BLOCK,), depth=2), "norm": RMSNorm} | knobs
    return nnx.merge(*random_module(lambda rngs: LanguageModel(rngs=rngs, **knobs))[:2])


def test_a_few_steps_of_descent_learn_a_sequence():
    stack = F(Stack, pattern=(BLOCK,), depth=1)
    make = F(LanguageModel, vocab=50, dim=16, stack=stack, norm=RMSNorm)
    graph, params, _ = random_module(lambda rngs: make(rngs=rngs), std=0.1)

    def loss(params):
        model = nnx.merge(graph, params)
        logits_BTV = model.logits(model(TOKENS[:, :-1], Context.of(TOKENS[:, :-1])).hidden_BTD)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), TOKENS[:, 1:, None], -1))

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda x, g: x - 0.3 * g, params, gradient)

    values = []
    for _ in range(30):
        value, params = step(params)
        values.append(float(value))
    assert values[0] > 0.8 * np.log(50) and values[-1] < 0.4 * values[0]


def test_the_padded_vocabulary_is_never_predicted():
    model = build(vocab_multiple=16)
    logits = model.logits(jax.random.normal(jax.random.key(0), (3, 10, 16)))
    assert model.embed.table.shape == (64, 16) and logits.shape == (3, 10, 64) and logits.dtype == jnp.float32
    assert np.all(np.asarray(logits[..., 50:]) == -np.inf) and np.isfinite(np.asarray(logits[..., :50])).all()
    gradient = jax.grad(lambda h: jax.nn.logsumexp(model.logits(h), -1).sum())(jnp.ones((1, 1, 16)))
    assert np.isfinite(np.asarray(gradient)).all()


def test_head_knobs():
    h, table = jax.random.normal(jax.random.key(0), (1, 2, 4)), jax.random.normal(jax.random.key(1), (6, 4))
    rngs = nnx.Rngs(params=0)
    np.testing.assert_allclose(Head(6, 4, rngs=rngs)(h, table), h @ table.T, atol=1e-5)
    capped = Head(6, 4, scale=3.0, soft_cap=2.0, rngs=rngs)(h, table)
    np.testing.assert_allclose(capped, 2 * jnp.tanh(3 * (h @ table.T) / 2), atol=1e-5)
    untied = Head(6, 4, tied=False, rngs=rngs)
    np.testing.assert_allclose(untied(h, table), h @ untied.linear.kernel[...], atol=1e-5)


def test_embedding_scale_and_learned_positions():
    embed = Embed(7, 4, scale=2.0, positions=5, rngs=nnx.Rngs(params=0))
    tokens = jnp.asarray([[1, 6, 1]])
    ctx = Context.of(tokens).replace(positions_BT=jnp.asarray([[0, 4, 0]]))
    expected = 2 * embed.table[...][tokens] + embed.positions[...][jnp.asarray([[0, 4, 0]])]
    np.testing.assert_allclose(embed(tokens, ctx), expected)
    with pytest.raises(ValueError, match=r"Embed.positions=5 is less than the length 6"):
        embed(jnp.zeros((1, 6), jnp.int32), Context.of(jnp.zeros((1, 6))))


def test_unequal_prompts_decode_as_each_alone():
    model = build(embed=F(Embed, positions=10))
    whole = jax.jit(lambda tokens: model(tokens, Context.of(tokens)).hidden_BTD)(TOKENS)
    extend = jax.jit(lambda tokens, cache, lengths: model.extend(tokens, cache, lengths))
    lengths = np.asarray([6, 2, 4])
    hidden, cache = extend(TOKENS[:, :6], model.init_cache(3, 10, jnp.float32), jnp.asarray(lengths))
    for step in range(4):
        for row in range(3):
            at = lengths[row] - 1
            got = hidden[row, at] if step == 0 else hidden[row, 0]
            np.testing.assert_allclose(got, whole[row, at + step], atol=1e-5)
        following = jnp.asarray([[TOKENS[row, lengths[row] + step]] for row in range(3)])
        hidden, cache = extend(following, cache, jnp.ones(3, jnp.int32))
    np.testing.assert_array_equal(cache["length_B"], lengths + 4)


def test_flops_count_the_head_and_triple_the_forward_pass():
    model = build(vocab_multiple=16)
    assert model.flops_per_token(64) == 3 * (model.stack.flops_per_token(64) + 2 * 16 * 50)
    # The usual 6 N + attention: N without the tied table once more as the head, causal attention 6 L T D.
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.split(build().stack)[1])) if leaf.ndim > 2]
    assert build().flops_per_token(64) == 6 * (sum(sizes) + 16 * 50) + 6 * 2 * 64 * 16


def attention(heads=2, **knobs):
    return Attention(16, heads=heads, rngs=nnx.Rngs(params=0), **knobs)


def gated(**knobs):
    return GatedMLP(16, rngs=nnx.Rngs(params=0), **knobs)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: build(vocab=0), "LanguageModel.vocab=0"),
        (lambda: build(vocab_multiple=0), "LanguageModel.vocab_multiple=0"),
        (lambda: build(head=F(Head, soft_cap=-1.0)), "Head.soft_cap=-1.0"),
        (lambda: build(head=F(Head, scale=0.0)), "Head.scale=0.0"),
        (lambda: build(embed=F(Embed, scale=0.0)), "Embed.scale=0.0"),
        (lambda: build(embed=F(Embed, positions=-1)), "Embed.positions=-1"),
        (lambda: attention(heads=3, kv_heads=2), "Attention.kv_heads=2"),
        (lambda: attention(heads=3), "Attention.heads=3"),
        (lambda: attention(head_dim=0), "Attention.head_dim=0"),
        (lambda: attention(window=0), "Attention.window=0"),
        (lambda: attention(soft_cap=0.0), "Attention.soft_cap=0.0"),
        (
            lambda: attention(causal=False).init_cache(1, 4, jnp.float32),
            "no cache",
        ),
        (lambda: gated(width=0), "GatedMLP.width=0"),
        (lambda: gated(width=4, activation="tanh"), "GatedMLP.activation='tanh'"),
    ],
)
def test_refusals(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()
