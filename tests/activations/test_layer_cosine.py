"""The cosine of a layer against a loop over tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike.activations.layer_cosine import LayerCosine
from maxlike.activations.statistic import Seen

RNG = np.random.default_rng(0)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8]])  # two documents; the rest of a document cut in two
REAL = np.array([[True] * 5 + [False], [True] * 6])


def seen(states) -> Seen:
    tapped = {"residual": [(jnp.asarray(x, jnp.float32), None) for x in states]}
    return Seen({"positions": jnp.asarray(POSITIONS)}, jnp.asarray(REAL), jnp.asarray(states[-1]), tapped)


def measured(states) -> list[float]:
    tool = LayerCosine(rows=2)
    totals = {name: np.asarray(mean.value()) for name, mean in tool.sums(seen(states)).items()}
    values = tool.values(totals)
    assert values["layer_cosine"] == pytest.approx(np.mean(values["layer_cosine/each"]))
    return values["layer_cosine/each"]


def test_equals_a_loop_over_the_tokens_that_count():
    states = [RNG.normal(size=(2, 6, 8)) for _ in range(4)]
    expected = []
    for x, y in itertools.pairwise(states):
        counted = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4), (1, 5)]
        cosines = [x[at] @ y[at] / np.linalg.norm(x[at]) / np.linalg.norm(y[at]) for at in counted]
        expected.append(np.mean(cosines))
    np.testing.assert_allclose(measured(states), expected, atol=1e-6)


def test_a_silent_layer_is_1_and_a_huge_first_token_is_not_seen():
    x = RNG.normal(size=(2, 6, 8))
    y = x.copy()
    y[:, 0], y[0, 3] = -1e4, 1e6
    assert measured([x, x, y]) == pytest.approx([1.0, 1.0])
    assert jax.tree.leaves(LayerCosine().sums(seen([x, 0 * x])))[0] == 0
