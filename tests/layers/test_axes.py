"""Collectives by logical axes: `shard_map` alone, nested, and with `constrain` inside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import axes
from maxlike.sharding import Mesh

RULES = {"batch": ("data", "fsdp"), "length": "context", "layers": "stage", "act_embed": None}


def layout(**shape):
    return Mesh(shape=shape, rules=RULES).open()


def shift(x_BT):
    """Each row one place to the right, the last value coming round, over shards of the length."""
    (name,) = axes.mesh_axes("length")

    def local(x_BT):
        size = jax.lax.axis_size(name)
        last = jax.lax.ppermute(x_BT[:, -1:], name, [(i, (i + 1) % size) for i in range(size)])
        return jnp.concatenate([last, x_BT[:, :-1]], 1)

    return axes.shard_map(local, over=(name,), inputs=(("batch", "length"),), outputs=("batch", "length"))(x_BT)


def test_shard_map_cuts_along_the_axes_it_is_given():
    x_BT = jnp.arange(32.0).reshape(4, 8)
    with axes.place_with(layout(data=2, context=4)):
        assert axes.mesh_axes("length") == ("context",) and axes.mesh_axes("act_embed") == ()
        np.testing.assert_array_equal(jax.jit(shift)(x_BT), jnp.roll(x_BT, 1, 1))
    assert axes.mesh_axes("length") == ()


def test_inside_another_shard_map_the_axes_it_took_are_gone():
    x_LBT = jnp.arange(64.0).reshape(2, 4, 8)

    def stage(x_LBT):
        assert axes.mesh_axes("layers") == ()
        # of the two data axes "batch" keeps both; a constraint on the axis that is cut already asks for nothing
        x_LBT = axes.constrain(x_LBT, "layers", "batch", "length")
        return jax.vmap(shift)(x_LBT) * (1 + jax.lax.axis_index("stage"))

    def loss(x_LBT):
        staged = axes.shard_map(
            stage, over=("stage",), inputs=(("layers", "batch", None),), outputs=("layers", "batch", None)
        )
        return jnp.sum(jnp.square(staged(x_LBT)))

    def expected(x_LBT):
        return jnp.sum(jnp.square(jnp.roll(x_LBT, 1, 2) * jnp.array([1.0, 2.0])[:, None, None]))

    with axes.place_with(layout(stage=2, data=2, context=2)):
        value, gradient = jax.jit(jax.value_and_grad(loss))(x_LBT)
    np.testing.assert_allclose(value, expected(x_LBT))
    np.testing.assert_allclose(gradient, jax.grad(expected)(x_LBT))


@pytest.mark.parametrize("over", [(), ("expert",)])
def test_an_axis_that_the_mesh_does_not_have_is_refused(over):
    with axes.place_with(layout(data=8)), pytest.raises(ValueError, match=r"open here are \['data'\]"):
        axes.shard_map(lambda x: x, over=over, inputs=((None,),), outputs=(None,))
    with pytest.raises(ValueError, match=r"open here are \[\]"):
        axes.shard_map(lambda x: x, over=("data",), inputs=((None,),), outputs=(None,))
