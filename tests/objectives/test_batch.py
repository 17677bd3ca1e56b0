"""The optional fields of a batch reach the model; what an objective refuses about models and batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.language_model import LanguageModel
from layers.norm import RMSNorm
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.next_token import NextToken
from tests.reference.random import random_module

F = functools.partial
FIELDS = {name: jnp.ones((2, 6), jnp.int32) for name in ("inputs", "targets", "segment_ids", "target_bytes")}
BATCH = FIELDS | {"positions": jnp.broadcast_to(jnp.arange(6), (2, 6)), "loss_weights": jnp.ones((2, 6))}
SOURCE = {name: jnp.full((2, 4), i) for i, name in enumerate(("sources", "source_positions", "source_segment_ids"))}


def test_fields_reach_the_context():
    plain = context_of(BATCH, None)
    assert plain.prefix_BT is None and plain.blocks_BT is None and plain.source is None and not plain.train
    extra = {"prefix": jnp.eye(2, 6, dtype=jnp.int8), "blocks": 7 * FIELDS["inputs"]} | SOURCE
    context = context_of(BATCH | extra, jax.random.key(0))
    assert context.train and context.prefix_BT.dtype == bool
    np.testing.assert_array_equal(context.prefix_BT, np.eye(2, 6) > 0)
    np.testing.assert_array_equal(context.blocks_BT, 7)
    for value, array in zip(
        (0, 1, 2), (context.source.tokens_BS, context.source.positions_BS, context.source.segments_BS)
    ):
        np.testing.assert_array_equal(array, value)


def test_half_a_source_is_refused():
    with pytest.raises(UserError, match="no `source_positions`"):
        context_of(BATCH | {"sources": SOURCE["sources"]}, None)


def test_losses_are_summed_for_the_objective_and_metrics_averaged():
    losses, metrics = read_aux(
        {"loss": jnp.asarray([1.0, 2.0]), "load": jnp.asarray([1.0, 3.0])}, jnp.asarray(5.0), "a"
    )
    assert float(losses) == 15.0
    values = {name: mean.value().tolist() for name, mean in metrics.items()}
    assert values == {"a/loss": 3.0, "a/load": 2.0, "a/load/each": [1.0, 3.0]}


def network(causal):
    block = F(Block, mixer=F(Attention, heads=2, causal=causal), ffn=None, norm=RMSNorm)
    make = F(LanguageModel, vocab=8, dim=8, stack=F(Stack, pattern=(block,), depth=1), norm=RMSNorm)
    return nnx.merge(*random_module(lambda rngs: make(rngs=rngs), std=1.0)[:2])


def test_a_prefix_changes_what_the_model_sees():
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 8, (2, 6)))
    run = jax.jit(lambda batch: NextToken()(network(True), batch, None)[0].value())
    plain = run(BATCH | {"inputs": inputs})
    assert float(plain) == pytest.approx(float(run(BATCH | {"inputs": inputs, "prefix": jnp.zeros((2, 6), bool)})))
    assert float(plain) != float(run(BATCH | {"inputs": inputs, "prefix": jnp.ones((2, 6), bool)}))


def test_a_model_that_sees_its_targets_is_refused():
    with pytest.raises(UserError, match="NextToken needs a causal model"):
        NextToken()(network(False), BATCH, None)
