"""Which tokens are hidden and how, and that the loss is the plain one over them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.language_model import Output
from maxlike.errors import UserError
from maxlike.objectives.masked_tokens import MaskedTokens

V, MASK = 50, 49


@dataclasses.dataclass
class Bag:
    """The least a bidirectional model must be: each position's logits from its own token and its neighbour."""

    table: jax.Array
    causal: bool = False
    vocab: int = V

    def __call__(self, tokens_BT, ctx):
        h = self.table[tokens_BT]
        return Output(h + 0.5 * jnp.roll(h, -1, 1), {})

    def logits(self, hidden):
        return hidden.astype(jnp.float32)


TABLE = jax.random.normal(jax.random.key(0), (V, V))


def batch(B=4, T=64):
    rng = np.random.default_rng(0)
    segments = np.ones((B, T), np.int32)
    segments[:, T // 2 :] = 2
    segments[:, -5:] = 0
    positions = np.concatenate([np.arange(T // 2), np.arange(T - T // 2)])
    return {
        "inputs": jnp.asarray(rng.integers(2, MASK, (B, T)), jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (B, T)),
        "target_bytes": jnp.asarray(rng.integers(1, 4, (B, T)), jnp.int32),
    }


def test_rates_and_shares():
    data = batch(B=40, T=2000)
    data["inputs"] = jnp.where(np.arange(2000) % 10 == 0, 1, data["inputs"])
    objective = MaskedTokens(mask_id=MASK, special_ids=(0, 1))
    noise = jax.jit(lambda data: objective.noise(data, jax.random.key(1), 0.3, V))
    noisy, chosen = (np.asarray(x) for x in noise(data))
    text, real = np.asarray(data["inputs"]), np.asarray(data["segment_ids"]) > 0
    free = real & (text != 1) & (np.asarray(data["positions"]) > 0)
    assert not (chosen & ~free).any() and (noisy[~chosen] == text[~chosen]).all()
    assert chosen.sum() / free.sum() == pytest.approx(0.3, abs=0.006)
    after = noisy[chosen]
    # A random id is the mask or the token itself once in V draws.
    assert np.mean(after == MASK) == pytest.approx(0.8 + 0.1 / V, abs=0.01)
    assert np.mean(after == text[chosen]) == pytest.approx(0.1 + 0.1 / V, abs=0.01)
    other = after[(after != MASK) & (after != text[chosen])]
    assert len(np.unique(other)) == V - 1


@pytest.mark.parametrize("read", ["same", "previous"])
def test_the_loss_over_chosen_positions_is_the_plain_one(read):
    data, key = batch(), jax.random.key(3)
    objective, model = MaskedTokens(mask_id=MASK, read=read, rate=0.4), Bag(TABLE)
    loss, metrics = jax.jit(lambda: objective(model, data, key))()

    @jax.jit
    def plain():
        noisy, chosen = objective.noise(data, jax.random.split(key)[0], 0.4, V)
        logits = model(noisy, None).hidden_BTD
        if read == "previous":
            logits = jnp.roll(logits, 1, 1)  # what lies at t is what the model said at t - 1
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), data["inputs"][..., None], -1)[..., 0], chosen

    nats, chosen = (np.asarray(x) for x in plain())
    assert float(loss.weight) == float(chosen.sum())
    assert float(loss.value()) == pytest.approx(float(nats[chosen].mean()), rel=1e-5)
    assert float(metrics["loss"].value()) == pytest.approx(float(loss.value()), rel=1e-6)
    assert float(metrics["dropped"].value()) == 0.0
    sizes = np.roll(np.asarray(data["target_bytes"]), 1, 1)[chosen].sum()
    bits = float(nats[chosen].sum()) / math.log(2) / sizes
    assert float(metrics["bits_per_byte"].value()) == pytest.approx(bits, rel=1e-5)


def test_an_evaluation_hides_the_same_tokens_at_its_own_rate():
    data = batch(B=8, T=256)
    run = jax.jit(functools.partial(MaskedTokens(mask_id=MASK, rate=0.6, evaluation_rate=0.15), Bag(TABLE)))
    first, again = run(data, None), run(data, None)
    assert float(first[0].total) == float(again[0].total)
    assert float(first[1]["chosen"].value()) == pytest.approx(0.15, abs=0.03)
    trained, other = run(data, jax.random.key(0)), run(data, jax.random.key(1))
    assert float(trained[1]["chosen"].value()) == pytest.approx(0.6, abs=0.05)
    assert float(trained[0].total) != float(other[0].total)


def test_a_row_fuller_than_its_room_is_counted(monkeypatch):
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, rate, shape: jnp.ones(shape, bool))
    loss, metrics = jax.jit(lambda: MaskedTokens(mask_id=MASK, rate=0.1)(Bag(TABLE), batch(), jax.random.key(0)))()
    room = math.ceil(6.4 + 4 * math.sqrt(0.1 * 0.9 * 64))
    assert float(loss.weight) == 4 * room
    assert float(metrics["dropped"].value()) == pytest.approx(1 - room / 57)


@pytest.mark.parametrize(
    ("knobs", "knob"),
    [
        ({"rate": 0.0}, "rate"),
        ({"evaluation_rate": 1.0}, "evaluation_rate"),
        ({"random_share": 0.6, "keep_share": 0.6}, "random_share"),
        ({"mask_id": -1}, "mask_id"),
        ({"read": "next"}, "read"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_refused_knobs(knobs, knob):
    with pytest.raises(UserError, match=rf"MaskedTokens\.{knob}"):
        MaskedTokens(**({"mask_id": MASK} | knobs))


def test_refused_models():
    with pytest.raises(UserError, match="bidirectional"):
        jax.eval_shape(lambda: MaskedTokens(mask_id=MASK)(Bag(TABLE, causal=True), batch(), None))
    with pytest.raises(UserError, match=f"{V} and LanguageModel.vocab={V}"):
        jax.eval_shape(lambda: MaskedTokens(mask_id=V)(Bag(TABLE), batch(), None))
