"""The embedding's table stays where it lies: looking up on a mesh is looking up on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import axes
from layers.embed import lookup
from maxlike.collectives import by_axis, collectives
from maxlike.sharding import Mesh
from tests import tiny

B, T, D, V = 8, 8, 12, 64
RULES = tiny.load().mesh.rules
RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(-2, V + 2, (B, T)), jnp.int32)  # some outside the table
MIX = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)


def loss(table, tokens):
    return jnp.sum(MIX * lookup(table, tokens) ** 2)


def on(shape, table=TABLE, tokens=TOKENS, rules=RULES):
    """((value, gradient), bytes by kind and axes) on a mesh."""
    layout = Mesh(shape=shape, rules=rules).open()

    def placed(table, tokens):
        with axes.place_with(layout):
            return jax.value_and_grad(loss)(table, tokens)

    where = (layout.sharding(("vocab", "embed"), table.shape, "table"), layout.batch(tokens.shape))
    compiled = jax.jit(placed, in_shardings=where, out_shardings=(None, where[0])).lower(table, tokens).compile()
    return compiled(*jax.device_put((table, tokens), where)), by_axis(collectives(compiled.as_text(), layout.mesh))


@pytest.mark.parametrize(
    "shape", [{"fsdp": 2, "tensor": 2, "context": 2}, {"data": 2, "fsdp": 4}, {"tensor": 4, "expert": 2}]
)
def test_a_mesh_gives_the_same_vectors_and_gradients(shape):
    wanted = jax.jit(jax.value_and_grad(loss))(TABLE, TOKENS)
    got, sent = on(shape)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    columns = sent.get(("all-gather", ("fsdp",)), 0)
    assert columns <= B * T * 4  # ids alone: no part of the table is gathered
    assert ("all-to-all", ("fsdp",)) in sent or "fsdp" not in shape


def test_a_table_cut_otherwise_is_left_to_the_compiler():
    wanted = jax.jit(jax.value_and_grad(loss))(TABLE, TOKENS)
    got, _ = on({"fsdp": 4, "data": 2}, rules=RULES | {"batch": "data"})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError,
        match=r"rows of 6 tokens \(Experiment.sequence_length\) do not divide over the 4 devices of the mesh axes",
    ):
        on({"tensor": 4}, tokens=TOKENS[:, :6])
