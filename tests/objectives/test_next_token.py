import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Head
from layers.language_model import LanguageModel, Output
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.objectives.next_token import NextToken

B, T, V = 2, 8, 13


@dataclasses.dataclass
class Bigram:
    """The least a model must be: a table of logits, and what layers report."""

    table: jax.Array
    aux: dict
    seen: list

    def __call__(self, tokens_BT, ctx):
        self.seen.append(ctx)
        return Output(self.table[tokens_BT], self.aux)

    def logits(self, hidden):
        return hidden.astype(jnp.float32)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "inputs": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "segment_ids": jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0], [1] * 8], jnp.int32),
        "positions": jnp.asarray([[0, 1, 2, 0, 1, 2, 0, 0], list(range(8))], jnp.int32),
        "loss_weights": jnp.asarray([[1, 1, 0, 1, 1, 0, 0, 0], [1] * 7 + [0]], jnp.float32),
        "target_bytes": jnp.asarray(rng.integers(0, 5, (B, T)), jnp.int32),
    }


def bigram(aux=None):
    table = jnp.asarray(np.random.default_rng(1).normal(size=(V, V)), jnp.float32)
    return Bigram(table, {} if aux is None else aux, [])


def test_loss_bytes_and_accuracy_are_weighted_by_the_mask():
    model, data = bigram(), batch()
    loss, metrics = NextToken()(model, data, None)
    logits = model.table[data["inputs"]]
    nats = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"]))
    mask = np.asarray(data["loss_weights"]) > 0
    assert float(loss.weight) == mask.sum() == 11
    assert float(loss.value()) == pytest.approx(nats[mask].mean(), rel=1e-6)
    assert float(metrics["loss"].value()) == pytest.approx(nats[mask].mean(), rel=1e-6)
    bits = nats[mask].sum() / math.log(2) / np.asarray(data["target_bytes"])[mask].sum()
    assert float(metrics["bits_per_byte"].value()) == pytest.approx(bits, rel=1e-6)
    right = (np.argmax(np.asarray(logits), -1) == np.asarray(data["targets"]))[mask].mean()
    assert float(metrics["accuracy"].value()) == pytest.approx(right, rel=1e-6)
    assert set(metrics) == {"loss", "bits_per_byte", "accuracy"}


def test_z_loss_is_its_formula_and_stays_out_of_the_reported_loss():
    model, data = bigram(), batch()
    without, _ = NextToken()(model, data, None)
    loss, metrics = NextToken(z_loss=0.1)(model, data, None)
    log_z = jax.nn.logsumexp(model.table[data["inputs"]], -1)
    expected = 0.1 * float(jnp.sum(data["loss_weights"] * log_z**2)) / 11
    assert float(metrics["z_loss"].value()) == pytest.approx(expected, rel=1e-6)
    assert float(loss.value() - without.value()) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"].value()) == pytest.approx(float(without.value()), rel=1e-6)


def test_layers_losses_are_added_and_their_metrics_averaged():
    aux = {"loss": jnp.asarray([0.25, 0.5]), "ffn/load": jnp.asarray([1.0, 3.0]), "deep": {"loss": jnp.asarray(2.0)}}
    data = batch()
    plain, _ = NextToken()(bigram(), data, None)
    loss, metrics = NextToken()(bigram(aux), data, None)
    assert float(loss.value() - plain.value()) == pytest.approx(2.75, rel=1e-5)
    assert float(metrics["layers/loss"].value()) == 0.75
    assert float(metrics["layers/deep/loss"].value()) == 2.0
    assert float(metrics["layers/ffn/load"].value()) == 2.0


def test_the_key_says_whether_it_trains():
    model, data = bigram(), batch()
    NextToken()(model, data, None)
    NextToken()(model, data, jax.random.key(0))
    evaluated, trained = model.seen
    assert not evaluated.train and evaluated.key is None
    assert trained.train and trained.key is not None
    np.testing.assert_array_equal(trained.segments_BT, data["segment_ids"])
    np.testing.assert_array_equal(trained.positions_BT, data["positions"])


def test_micro_batches_add_up_to_the_batch():
    model, data = bigram(), batch()
    whole, metrics = NextToken(z_loss=0.1)(model, data, None)
    halves = [NextToken(z_loss=0.1)(model, jax.tree.map(lambda x, i=i: x[i : i + 1], data), None) for i in range(B)]
    total = halves[0][0] + halves[1][0]
    assert float(total.value()) == pytest.approx(float(whole.value()), rel=1e-6)
    for name, mean in metrics.items():
        assert float((halves[0][1][name] + halves[1][1][name]).value()) == pytest.approx(float(mean.value()), rel=1e-6)


def test_a_batch_without_weighted_targets_costs_nothing():
    data = batch() | {"loss_weights": jnp.zeros((B, T))}
    loss, metrics = NextToken(z_loss=0.1)(bigram(), data, None)
    assert float(loss.value()) == 0.0
    assert all(float(mean.value()) == 0.0 for mean in metrics.values())


@pytest.mark.parametrize(("knobs", "knob"), [({"z_loss": -1.0}, "z_loss"), ({"chunk": 0}, "chunk")])
def test_refusals_name_the_knob(knobs, knob):
    with pytest.raises(UserError, match=rf"NextToken\.{knob}"):
        NextToken(**knobs)


def test_a_real_model_gets_the_gradients_of_the_plain_loss():
    """The head is tied: the table's gradient is the sum of its two uses."""
    block = functools.partial(
        Block, mixer=functools.partial(Attention, heads=2), ffn=functools.partial(GatedMLP, width=16), norm=RMSNorm
    )
    stack, head = functools.partial(Stack, pattern=(block,), depth=1), functools.partial(Head, soft_cap=5.0)
    embed, rngs = functools.partial(Embed, std=1.0), nnx.Rngs(params=0)
    model = LanguageModel(
        vocab=V, dim=8, stack=stack, norm=RMSNorm, embed=embed, head=head, vocab_multiple=4, rngs=rngs
    )
    graph, params = nnx.split(model)
    params, data = nnx.to_pure_dict(params), batch()

    def chunked(params):
        return NextToken(z_loss=0.01, chunk=3)(nnx.merge(graph, params), data, jax.random.key(0))[0].total

    def plain(params):
        network = nnx.merge(graph, params)
        ctx = Context(positions_BT=data["positions"], segments_BT=data["segment_ids"], train=True)
        logits = network.logits(network(data["inputs"], ctx).hidden_BTD)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
        return jnp.sum(data["loss_weights"] * (nats + 0.01 * jax.nn.logsumexp(logits, -1) ** 2))

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (chunked, plain))
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got[1], expected[1])
