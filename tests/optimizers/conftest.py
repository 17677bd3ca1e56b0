"""A tree of parameters with every kind of axes, as nested dicts, and gradients for it."""

import jax
import numpy as np
import pytest

AXES = {
    "embed": {"table": ("vocab", "embed")},
    "stack": {
        0: {
            "norm": ("layers", "norm"),
            "q": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
            "out": ("layers", "heads", "head_dim", "embed"),
            "up": ("layers", "embed", "mlp"),
            "expert": ("layers", "experts", "mlp", "embed"),
            "router": ("layers", "embed", "experts"),
            "conv": ("layers", "mlp", "taps"),
        }
    },
    "project": ("embed", "embed_out"),
    "scale": (),
}
SIZES = {
    "vocab": 11,
    "embed": 8,
    "embed_out": 8,
    "heads": 2,
    "head_dim": 3,
    "mlp": 12,
    "experts": 4,
    "norm": 8,
    "taps": 3,
    "layers": 2,
}


FEW = {"table": ("vocab", "embed"), "norm": ("layers", "norm"), "up": ("layers", "embed", "mlp")}


def make(seed: int, axes: dict) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda axes: rng.normal(size=[SIZES[axis] for axis in axes]).astype(np.float32),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


@pytest.fixture
def axes() -> dict:
    return AXES


@pytest.fixture
def few() -> dict:
    """One parameter of each kind, for tests that compile: an embedding, a vector, a stack of matrices."""
    return FEW


@pytest.fixture
def tensors():
    """tensors(seed, axes): a parameter or gradient tree."""
    return make


@pytest.fixture
def run():
    """run(transformation, params, gradients): the parameters after one update for each gradient tree, and the state."""

    def run(transformation, params, gradients):
        @jax.jit
        def step(params, state, grads):
            updates, state = transformation.update(grads, state, params)
            return jax.tree.map(lambda p, u: p + u, params, updates), state

        state = transformation.init(params)
        for grads in gradients:
            params, state = step(params, state, grads)
        return params, state

    return run
