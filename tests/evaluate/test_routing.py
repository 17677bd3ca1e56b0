"""The causal loss: routing anew changes what it should, lots are drawn as often as they say, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.auxiliary_router import AuxiliaryRouter
from layers.block import Block
from layers.context import Context
from layers.language_model import LanguageModel
from layers.mixture_of_depths import MixtureOfDepths
from layers.modality_moe import ModalityMoE
from layers.norm import RMSNorm
from layers.stack import Stack
from maxlike import config
from maxlike.errors import UserError
from maxlike.evaluate import routing
from tests.reference.random import random_module

F = functools.partial
B, T, V = 2, 16, 12
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)


def network(auxiliary=AuxiliaryRouter, **knobs):
    ffn = F(ModalityMoE, groups=(2, 1), width=12, auxiliary=auxiliary, **knobs)
    block = F(Block, mixer=F(Attention, heads=2), ffn=ffn, norm=RMSNorm, order="swin")
    thin = F(MixtureOfDepths, block=block, capacity=0.5, auxiliary=auxiliary)
    stack = F(Stack, pattern=(thin, block), depth=2, scan=True)
    build = F(LanguageModel, vocab=V, dim=16, stack=stack, norm=RMSNorm, modality_starts=(6,))
    graph, params, _ = random_module(lambda rngs: build(rngs=rngs))
    return lambda: nnx.merge(graph, params)


def hidden(model, route=lambda model: None):
    route(model)
    return np.asarray(jax.jit(lambda tokens: model(tokens, Context.of(tokens)).hidden_BTD)(TOKENS))


@pytest.mark.large
def test_a_network_is_routed_as_asked_whatever_its_own_evaluation_and_room():
    """Bounds of 0.2 drop most choices; they are of training, and evaluation makes them all."""
    tight, roomy = network(capacity_bound=(0.2, 0.2)), network()
    decoded = network(evaluation="auxiliary")
    trained = hidden(roomy())
    np.testing.assert_array_equal(hidden(tight(), routing.as_trained), trained)
    np.testing.assert_array_equal(hidden(decoded(), routing.as_trained), trained)
    assert not np.allclose(hidden(tight()), trained)
    causal = hidden(decoded(), routing.as_decoded)
    np.testing.assert_array_equal(hidden(tight(), routing.as_decoded), causal)
    assert not np.allclose(causal, trained)
    by_lot = hidden(tight(), lambda model: routing.by_chance(model, 0))
    assert not np.allclose(by_lot, causal) and not np.allclose(by_lot, trained)
    np.testing.assert_array_equal(by_lot, hidden(decoded(), lambda model: routing.by_chance(model, 0)))


@pytest.mark.parametrize("outputs", [4, None])
def test_lots_are_drawn_as_often_as_they_say_and_anew_for_every_input(outputs):
    lots, x = routing.Lots(0.25, outputs, seed=3), jax.random.normal(jax.random.key(0), (2, 2000, 8))
    drawn = lots(x)
    assert drawn.shape == ((2, 2000, 4) if outputs else (2, 2000))
    assert abs(float((drawn > 0).mean()) - 0.25) < 0.04
    assert bool((drawn == lots(x)).all()) and not bool((drawn == lots(x + 1)).all())


def test_a_network_without_a_causal_loss_is_refused():
    for model, knob in ((network(auxiliary=None), "ModalityMoE.auxiliary"),):
        with pytest.raises(UserError, match=knob):
            routing._refuse_without_auxiliary(model())
    with pytest.raises(UserError, match="seed=-1"):
        routing.CausalLoss(seed=-1)
    mixed = config.load("papers/moma/mod_moma_4t4i", bindings=["modality_moe.ModalityMoE.groups = (1, 1)"])
    with pytest.raises(UserError, match=r"MixtureOfDepths\.auxiliary"):
        routing.CausalLoss().check(mixed)
