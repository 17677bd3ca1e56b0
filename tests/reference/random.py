"""Modules with random parameters made by numpy: building one compiles nothing."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx


def random_module(build: Callable[[nnx.Rngs], nnx.Module], seed: int = 0, std: float = 0.3):
    """(graph, pure dict of float32 parameters, axes by leaf) of `build(rngs)`: gains around 1, all else around 0.

    Biases, sinks and gains get spread too, which their own initial values would not show.
    """
    graph, abstract = jax.eval_shape(lambda: nnx.split(build(nnx.Rngs(params=0))))
    variables = jax.tree.leaves(abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    axes = [variable.get_metadata("axes") for variable in variables]
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(abstract))
    rng = np.random.default_rng(seed)
    values = [
        (std * rng.standard_normal(leaf.shape) + (1.0 if "norm" in names else 0.0)).astype(np.float32)
        for leaf, names in zip(leaves, axes, strict=True)
    ]
    return graph, jax.tree.unflatten(tree, values), axes
