"""Prediction further ahead: what each module reads and must not, and that its loss is the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.multi_token import MultiToken as Modules
from layers.multi_token import shift
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.objectives.multi_token import MultiToken
from maxlike.objectives.next_token import NextToken
from tests.reference.random import random_module

F = functools.partial
B, T, V, D = 2, 12, 20, 16
BLOCK = F(Block, mixer=F(Attention, heads=2, rope=RoPE), ffn=F(GatedMLP, width=24), norm=RMSNorm)


def make(rngs, depth=2, **knobs):
    mtp = F(Modules, block=BLOCK, norm=RMSNorm, depth=depth) if depth else None
    stack = F(Stack, pattern=(BLOCK,), depth=1)
    return LanguageModel(vocab=V, dim=D, stack=stack, norm=RMSNorm, mtp=mtp, rngs=rngs, **knobs)


GRAPH, PARAMS, _ = random_module(make)


def batch():
    """Two documents in the first row, then padding; the first target of its second document has no weight."""
    text = np.random.default_rng(0).integers(0, V, (B, T + 1))
    segments = np.asarray([[1] * 5 + [2] * 5 + [0] * 2, [1] * 12], np.int32)
    positions = np.asarray([[*range(5), *range(5), 0, 0], [*range(12)]], np.int32)
    weights = np.asarray([[1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0], [1] * 12], np.float32)
    return {
        "inputs": jnp.asarray(text[:, :-1], jnp.int32),
        "targets": jnp.asarray(text[:, 1:], jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(positions),
        "loss_weights": jnp.asarray(weights),
        "target_bytes": jnp.ones((B, T), jnp.int32),
    }


def test_loss_and_gradient_are_the_plain_ones():
    """Every position and every module by hand, with embedding and head shared."""
    data = batch()
    segments, weights, targets = (np.asarray(data[name]) for name in ("segment_ids", "loss_weights", "targets"))

    def ours(params):
        loss, metrics = MultiToken(weight=0.3)(nnx.merge(GRAPH, params), data, jax.random.key(0))
        return loss.total, metrics

    def plain(params):
        model = nnx.merge(GRAPH, params)
        ctx = Context(data["positions"], data["segment_ids"], train=True)
        hidden = model(data["inputs"], ctx).hidden_BTD
        nats = -jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), data["targets"][..., None], -1)[..., 0]
        total = jnp.sum(nats * data["loss_weights"])
        ahead = 0.0
        for n, module in enumerate(model.mtp.steps, 1):
            following = jnp.roll(data["targets"], 1 - n, 1)
            joined = jnp.concatenate(
                [module.embed_norm(model.embed.table[...][following]), module.hidden_norm(hidden)], -1
            )
            x_BTD, _ = module.block(joined @ module.join.kernel[...], ctx)
            hidden = module.norm(x_BTD)
            logprobs, counted = jax.nn.log_softmax(model.logits(hidden)), []
            for b in range(B):
                for t in range(T - n):
                    same = segments[b, t] == segments[b, t + n] != 0
                    if same and weights[b, t + n] > 0:
                        counted.append((b, t, targets[b, t + n]))
            ahead -= jnp.sum(logprobs[tuple(np.transpose(counted))])
        return total + 0.3 * ahead / 2

    (got, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(PARAMS)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(PARAMS)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, expected_gradient)
    assert {"loss", "bits_per_byte", "accuracy", "mtp_loss", "mtp_accuracy"} <= set(metrics)
    assert float(metrics["mtp_loss"].weight) == (3 + 3 + 11) + (2 + 2 + 10)


def test_micro_batches_add_up_to_the_batch():
    """Though the rows have other shares of targets further ahead."""
    data, model = batch(), nnx.merge(GRAPH, PARAMS)
    total = jax.jit(lambda part: MultiToken(weight=5.0)(model, part, None)[0].total)
    parts = [total({name: x[b : b + 1] for name, x in data.items()}) for b in range(B)]
    assert float(sum(parts)) == pytest.approx(float(total(data)), rel=1e-5)


def test_the_model_itself_does_not_change():
    """Logits, decoding and the next-token loss with and without modules are the same numbers."""
    bare_graph, bare, _ = random_module(lambda rngs: make(rngs, depth=0))
    params = {name: PARAMS[name] for name in bare}
    data = batch()

    def run(objective, graph, params):
        model = nnx.merge(graph, params)
        decoded, _ = model.extend(data["inputs"][:, :5], model.init_cache(B, T, jnp.float32))
        return objective(model, data, None)[0].value(), decoded

    one = jax.jit(lambda: run(MultiToken(weight=0.0), GRAPH, PARAMS))()
    other = jax.jit(lambda: run(NextToken(), bare_graph, params))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, other)


def test_a_module_sees_the_tokens_up_to_the_one_before_its_target():
    model = nnx.merge(GRAPH, PARAMS)
    tokens = jnp.asarray(batch()["targets"][1:])
    ctx = Context.of(tokens)

    def hidden(embedded_TD):
        """Of both modules, as a function of the embedded tokens: those of the row, and those that follow."""
        x, _ = model.stack(embedded_TD[None, :T], ctx)
        following = jnp.arange(1, T + 1)[None]  # ids stand for places in embedded_TD
        ahead = model.mtp(model.norm(x), following, lambda ids, _: embedded_TD[ids], ctx)
        return jnp.stack([h[0].sum(-1) for h, _ in ahead])

    embedded_TD = jax.random.normal(jax.random.key(0), (T + 2, D))
    influence = np.abs(jax.jit(jax.jacrev(hidden))(embedded_TD)).sum(-1)  # [module, t, token]
    for n in (1, 2):
        for t in range(T - 2):
            assert influence[n - 1, t, t + n] > 0 and np.all(influence[n - 1, t, t + n + 1 :] == 0)


def test_flops_count_the_modules_and_their_heads():
    model, bare = nnx.merge(GRAPH, PARAMS), nnx.merge(*random_module(lambda rngs: make(rngs, depth=0))[:2])
    block = model.mtp.steps[0].block.flops_per_token(T)
    extra = 2 * (2 * 2 * D * D + block + 2 * D * V)
    assert model.flops_per_token(T) == bare.flops_per_token(T) + 3 * extra


def test_shift():
    np.testing.assert_array_equal(shift(jnp.asarray([[1, 2, 3]]), 2), [[3, 0, 0]])
    np.testing.assert_array_equal(shift(jnp.asarray([[1, 2, 3]]), 0), [[1, 2, 3]])


def test_refusals():
    with pytest.raises(UserError, match=r"MultiToken.weight=-1.0"):
        MultiToken(weight=-1.0)
    with pytest.raises(UserError, match=r"LanguageModel.mtp"):
        jax.eval_shape(lambda: MultiToken()(make(nnx.Rngs(params=0), depth=0), batch(), None))
    ahead = F(Modules, block=F(BLOCK, mixer=F(Attention, heads=2, causal=False)), norm=RMSNorm)
    stack = F(Stack, pattern=(BLOCK,), depth=1)
    leaking = F(LanguageModel, vocab=V, dim=D, stack=stack, norm=RMSNorm, mtp=ahead)
    with pytest.raises(UserError, match="MultiToken needs a causal model"):
        jax.eval_shape(lambda: MultiToken()(leaking(rngs=nnx.Rngs(params=0)), batch(), None))
    with pytest.raises(ValueError, match=r"MultiToken.depth=0"):
        jax.eval_shape(lambda: Modules(D, block=BLOCK, norm=RMSNorm, depth=0, rngs=nnx.Rngs(params=0)))
