"""Linear: its matrix view, its own backward pass and its FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.linear import Linear
from tests.reference.random import random_module


@pytest.mark.parametrize(
    ("inputs", "outputs", "axes"),
    [
        ((6,), (2, 5), (("embed",), ("heads", "head_dim"))),  # widening: the backward pass transposes x
        ((2, 5), (6,), (("heads", "head_dim"), ("embed",))),  # narrowing: it transposes the gradient
    ],
)
def test_value_and_gradient_are_a_tensor_contraction(inputs, outputs, axes):
    graph, params, _ = random_module(lambda rngs: Linear(inputs, outputs, *axes, bias=True, rngs=rngs))
    x = jax.random.normal(jax.random.key(1), (3, 4, *inputs))

    def ours(x, params):
        return nnx.merge(graph, params)(x)

    def plain(x, params):
        return jnp.tensordot(x, params["kernel"], len(inputs)) + params["bias"]

    def value_and_gradients(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1)))(x, params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), value_and_gradients(ours), value_and_gradients(plain)
    )
    assert nnx.merge(graph, params).flops_per_token() == 2 * 6 * 10


def test_the_initial_spread_follows_the_fan_in():
    std = lambda **knobs: float(  # noqa: E731
        jnp.std(Linear((400,), (50,), ("embed",), ("mlp",), rngs=nnx.Rngs(params=0), **knobs).kernel[...])
    )
    assert std() == pytest.approx(400**-0.5, rel=0.03) and std(std=0.5) == pytest.approx(0.5, rel=0.03)
    with pytest.raises(ValueError, match=r"Linear.std=0"):
        std(std=0.0)
