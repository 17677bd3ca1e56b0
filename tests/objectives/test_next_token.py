import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers import axes
from layers.context import Context
from layers.embed import Embed, Head
from layers.language_model import LanguageModel, Output
from layers.norm import RMSNorm
from maxlike.errors import UserError
from maxlike.objectives.next_token import NextToken

B, T, V = 2, 8, 13
TABLE = jnp.asarray(np.random.default_rng(1).normal(size=(V, V)), jnp.float32)


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


@functools.partial(jax.jit, static_argnames="z_loss")
def measured(table, aux, data, z_loss=0.0):
    return NextToken(z_loss=z_loss)(Bigram(table, aux, []), data, None)


@pytest.fixture(scope="module")
def nats():
    """Plain cross-entropy and log Z of each position of `batch()`, in float64."""
    data, logits = batch(), np.asarray(TABLE, np.float64)[np.asarray(batch()["inputs"])]
    log_z = np.log(np.sum(np.exp(logits), -1))
    return log_z - np.take_along_axis(logits, np.asarray(data["targets"])[..., None], -1)[..., 0], log_z


def test_loss_bytes_and_accuracy_are_weighted_by_the_mask(nats):
    data = batch()
    loss, metrics = measured(TABLE, {}, data)
    mask = np.asarray(data["loss_weights"]) > 0
    assert float(loss.weight) == mask.sum() == 11
    assert float(loss.value()) == pytest.approx(nats[0][mask].mean(), rel=1e-6)
    bits = nats[0][mask].sum() / math.log(2) / np.asarray(data["target_bytes"])[mask].sum()
    best = np.argmax(np.asarray(TABLE)[np.asarray(data["inputs"])], -1)
    right = (best == np.asarray(data["targets"]))[mask].mean()
    expected = {"loss": nats[0][mask].mean(), "bits_per_byte": bits, "accuracy": right}
    assert {name: float(mean.value()) for name, mean in metrics.items()} == pytest.approx(expected, rel=1e-6)


def test_z_loss_is_its_formula_and_stays_out_of_the_reported_loss(nats):
    data = batch()
    loss, metrics = measured(TABLE, {}, data, z_loss=0.1)
    mask = np.asarray(data["loss_weights"]) > 0
    expected = 0.1 * np.mean(nats[1][mask] ** 2)
    assert float(metrics["z_loss"].value()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["loss"].value()) == pytest.approx(nats[0][mask].mean(), rel=1e-6)
    assert float(loss.value()) == pytest.approx(nats[0][mask].mean() + expected, rel=1e-6)


def test_layers_losses_are_added_and_their_metrics_averaged(nats):
    aux = {"loss": jnp.asarray([0.25, 0.5]), "ffn/load": jnp.asarray([1.0, 3.0]), "deep": {"loss": jnp.asarray(2.0)}}
    data = batch()
    loss, metrics = measured(TABLE, aux, data)
    plain = nats[0][np.asarray(data["loss_weights"]) > 0].mean()
    assert float(loss.value()) == pytest.approx(plain + 2.75, rel=1e-6)
    assert float(metrics["loss"].value()) == pytest.approx(plain, rel=1e-6)
    assert float(metrics["layers/loss"].value()) == pytest.approx(0.75)
    assert float(metrics["layers/deep/loss"].value()) == pytest.approx(2.0)
    assert float(metrics["layers/ffn/load"].value()) == pytest.approx(2.0)


def test_the_key_says_whether_it_trains():
    seen, data = [], batch()
    for key in (None, jax.random.key(0)):
        jax.eval_shape(lambda key=key: NextToken()(Bigram(TABLE, {}, seen), data, key))
    evaluated, trained = seen
    assert not evaluated.train and evaluated.key is None
    assert trained.train and trained.key is not None
    assert trained.segments_BT is data["segment_ids"] and trained.positions_BT is data["positions"]


def test_micro_batches_add_up_to_the_batch():
    data = batch()
    whole = measured(TABLE, {}, data, z_loss=0.1)
    halves = [measured(TABLE, {}, jax.tree.map(lambda x, i=i: x[i : i + 1], data), z_loss=0.1) for i in range(B)]
    summed = jax.tree.map(lambda a, b: a + b, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), summed, whole)


def test_a_batch_without_weighted_targets_costs_nothing():
    loss, metrics = measured(TABLE, {}, batch() | {"loss_weights": jnp.zeros((B, T))}, z_loss=0.1)
    assert float(loss.value()) == 0.0
    assert all(float(mean.value()) == 0.0 for mean in metrics.values())


@pytest.mark.parametrize(("knobs", "knob"), [({"z_loss": -1.0}, "z_loss"), ({"chunk": 0}, "chunk")])
def test_refusals_name_the_knob(knobs, knob):
    with pytest.raises(UserError, match=rf"NextToken\.{knob}"):
        NextToken(**knobs)


class RunningSum(nnx.Module):
    """The cheapest stack that mixes positions: what is tested here is the model around it."""

    def __init__(self, dim, *, rngs):
        self.kernel = axes.param(rngs, (dim, dim), ("embed", "embed_out"))

    def __call__(self, x_BTD, ctx):
        return x_BTD + jnp.cumsum(x_BTD, 1) @ self.kernel[...], {"size": jnp.mean(jnp.square(x_BTD))[None]}


def test_a_real_model_gets_the_gradients_of_the_plain_loss():
    """The head is tied: the table's gradient is the sum of its two uses."""
    embed, head, rngs = functools.partial(Embed, std=1.0), functools.partial(Head, soft_cap=5.0), nnx.Rngs(params=0)
    factories = {"stack": RunningSum, "norm": RMSNorm, "embed": embed, "head": head}
    model = LanguageModel(vocab=V, dim=8, vocab_multiple=4, rngs=rngs, **factories)
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


@dataclasses.dataclass
class TwoModalities(Bigram):
    """Token ids from 9 on are of the second modality."""

    modalities = 2

    def modality(self, tokens_BT):
        return (tokens_BT >= 9).astype(jnp.int32)


def test_the_loss_of_each_modality_is_over_its_own_targets(nats):
    data = batch()
    _, metrics = jax.jit(
        lambda table: NextToken(modalities=("text", "image"))(TwoModalities(table, {}, []), data, None)
    )(TABLE)
    mask, image = np.asarray(data["loss_weights"]) > 0, np.asarray(data["targets"]) >= 9
    for name, here in (("text", mask & ~image), ("image", mask & image)):
        assert float(metrics[f"loss/{name}"].weight) == here.sum() > 0
        assert float(metrics[f"loss/{name}"].value()) == pytest.approx(nats[0][here].mean(), rel=1e-6)


def test_names_of_modalities_that_the_model_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"NextToken\.modalities names 3 modalities and the model has 2"):
        NextToken(modalities=("text", "image", "sound"))(TwoModalities(TABLE, {}, []), batch(), None)
    with pytest.raises(UserError, match="names one modality twice"):
        NextToken(modalities=("text", "text"))
