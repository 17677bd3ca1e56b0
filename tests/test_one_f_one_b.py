"""One forward, one backward: loss, metrics, every gradient and statistic are those of accumulated micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.block import Block
from layers.embed import Head
from layers.language_model import LanguageModel
from layers.multi_token import MultiToken
from layers.norm import RMSNorm
from layers.pipeline import Circular
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.model import AbstractModel
from maxlike.objectives import multi_token
from maxlike.objectives.next_token import NextToken
from maxlike.one_f_one_b import OneFOneB
from maxlike.sharding import Mesh, state_shardings
from maxlike.step import Step
from tests import tiny
from tests.reference.pipeline import Counting, Mixing, micro_batches
from tests.reference.random import random_module

F = functools.partial
V, D, T = 16, 8, 6
RULES = tiny.load().mesh.rules
BLOCK = F(Block, mixer=Mixing, ffn=Counting, norm=RMSNorm)
MODELS = {
    "tied": {"stack": F(Stack, pattern=(BLOCK,), depth=4, scan=True)},
    "untied, blocks outside": {
        "stack": F(Stack, pattern=(BLOCK,), depth=2, prefix=(BLOCK,), suffix=(BLOCK,), scan=True),
        "head": F(Head, tied=False),
    },
}


def language_model(**knobs):
    return F(LanguageModel, **{"vocab": V, "dim": D, "norm": RMSNorm} | knobs)


def batch(B):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments = 2 - np.sort(rng.integers(0, 3, (B, T)), 1).astype(np.int32)
    weights = rng.random((B, T)) * (rng.random((B, 1)) < 0.8) * (segments > 0)  # micro-batches of unequal weight
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "loss_weights": weights.astype(np.float32),
        "target_bytes": np.full((B, T), 4, np.int32),
    }


def sums(step, model, state, batch, layout=None, objective=None):
    """(loss, metrics, gradients, statistics as means over the micro-batches) of one batch."""

    @jax.jit
    def run(state, batch):
        with axes.place_with(layout):
            out = step._gradients(state, batch, jax.random.key(1), model, objective or NextToken(z_loss=1e-3, chunk=4))
        return *out[:3], jax.tree.map(lambda s: s / step.micro_batches, out[3])

    if layout is not None:
        shardings = state_shardings(state, model.params, model.axes, layout)
        state = jax.device_put(state, shardings)
        batch = jax.device_put(batch, {name: layout.batch(x.shape) for name, x in batch.items()})
    return run(state, batch)


@pytest.mark.parametrize(
    ("name", "shape", "B", "M", "dtype"),
    [
        ("tied", {"stage": 4, "data": 2}, 16, 2, "float32"),  # M < S
        pytest.param("tied", {"stage": 2}, 12, 6, "bfloat16", marks=pytest.mark.large),
        pytest.param(  # M no multiple of S
            "untied, blocks outside", {"stage": 2, "fsdp": 2, "tensor": 2}, 12, 3, "float32", marks=pytest.mark.large
        ),
    ],
)
def test_it_is_the_sum_over_micro_batches(name, shape, B, M, dtype):
    network = language_model(**MODELS[name])
    model = AbstractModel.of(network)
    _, values, _ = random_module(lambda rngs: network(rngs=rngs))
    params = select(values, model.params)
    state = {"params": params, "buffers": select(values, model.buffers)}
    rows = batch(B)
    order = micro_batches(B, shape["stage"], M).T.reshape(-1)
    expected = sums(
        Step(micro_batches=M, compute_dtype=dtype), model, state, {name: x[order] for name, x in rows.items()}
    )
    layout = Mesh(shape=shape, rules=RULES).open()
    got = sums(Step(compute_dtype=dtype, gradients=F(OneFOneB, micro_batches=M)), model, state, rows, layout)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max())), got, expected
    )
    assert {g.dtype for g in jax.tree.leaves(got[2])} == {jnp.dtype("float32")}


def select(values, like):
    """The part of a nested dict that has the structure of another."""
    return {k: select(values[k], v) if isinstance(v, dict) else values[k] for k, v in like.items()}


@pytest.mark.parametrize(
    ("network", "objective", "shape", "sentence"),
    [
        ({"mtp": F(MultiToken, block=BLOCK, norm=RMSNorm)}, NextToken(), {"stage": 2}, "LanguageModel.mtp apart"),
        ({}, multi_token.MultiToken(), {"stage": 2}, "gradients of NextToken, not of MultiToken"),
        ({}, NextToken(), {"data": 2}, "OneFOneB needs stages"),
        ({}, NextToken(), {"stage": 4}, "OneFOneB.micro_batches=3 does not divide the 8 rows"),
    ],
)
def test_what_it_cannot_take_apart_is_refused(network, objective, shape, sentence):
    model = AbstractModel.of(language_model(**MODELS["tied"], **network))
    step = Step(gradients=F(OneFOneB, micro_batches=3))
    layout = Mesh(shape=shape, rules=RULES).open()
    state = {"params": model.params, "buffers": model.buffers}
    with axes.place_with(layout), pytest.raises((UserError, ValueError), match=sentence):
        jax.eval_shape(lambda s: step._gradients(s, batch(8), jax.random.key(0), model, objective), state)


def test_only_language_models_are_taken_apart():
    class Other(nnx.Module):
        def __init__(self, *, rngs):
            self.w = axes.param(rngs, (2,), ("norm",))

    model = AbstractModel.of(Other)
    with pytest.raises(UserError, match="cannot take a Other apart, only a LanguageModel"):
        OneFOneB(micro_batches=1)(model.params, model.buffers, {}, jax.random.key(0), model, NextToken())


def test_no_micro_batch_is_refused():
    with pytest.raises(UserError, match=r"OneFOneB\.micro_batches=0"):
        OneFOneB(micro_batches=0)


def largest(jaxpr, trailing):
    """The most elements of any floating array in a program, among those whose last dimensions are `trailing`."""
    sizes = [0]
    for equation in jaxpr.eqns:
        for aval in (v.aval for v in equation.outvars):
            if aval.shape[-len(trailing) :] == trailing and jnp.issubdtype(aval.dtype, jnp.floating):
                sizes.append(aval.size)
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = parameter.jaxpr if hasattr(parameter, "jaxpr") else parameter
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner, trailing))
    return max(sizes)


@pytest.mark.parametrize("one_f_one_b", [True, False])
def test_it_keeps_the_inputs_of_as_many_micro_batches_as_are_under_way(one_f_one_b):
    B, M, S = 32, 16, 2
    schedule = {"gradients": F(OneFOneB, micro_batches=M)} if one_f_one_b else {}
    stack = F(Stack, pattern=(BLOCK,), depth=2, scan=True, pipeline=F(Circular, micro_batches=M))
    model = AbstractModel.of(language_model(stack=stack))
    state = {"params": model.params, "buffers": model.buffers}

    def run(state):
        with axes.place_with(Mesh(shape={"stage": S}, rules=RULES).open()):
            return Step(**schedule)._gradients(state, batch(B), jax.random.key(0), model, NextToken())[2]

    kept = largest(jax.make_jaxpr(run)(state).jaxpr, (T, D)) / (B // M * T * D)
    # what jax keeps for a backward pass is of all stages at once
    assert kept == (2 * S - 1 if one_f_one_b else S * (M + S - 1))
