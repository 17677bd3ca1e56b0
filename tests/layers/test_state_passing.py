"""Recurrences and convolutions of rows cut over devices against the same rows on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.conv import ShortConv
from layers.recurrence import recurrence
from maxlike.sharding import Mesh

RULES = {"batch": "data", "length": "context", "act_heads": "tensor", "mlp": None}
B, T, H, N, K = 2, 32, 4, 6, 5
# decay by kind, whether the delta rule, groups of queries and keys
KINDS = {
    "constant_grouped": ("constant", False, 2),
    "token_one_group": ("token", False, 1),
    "channel": ("channel", False, 4),
    "delta": ("none", True, 4),
    "gated_delta_grouped": ("token", True, 2),
}
# Documents that end at a cut, span several, and begin after padding; a row of one document; T / C is 8.
SEGMENTS = np.array([[1] * 8 + [2] * 14 + [0] * 3 + [3] * 7, [1] * 32], np.int32)


def place(**shape):
    return axes.place_with(Mesh(shape=shape, rules=RULES).open())


def inputs(name: str) -> dict:
    decay, delta, groups = KINDS[name]
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((B, T, groups, N)) for _ in range(2))
    shape = {"none": None, "constant": (H,), "token": (B, T, H), "channel": (B, T, H, N)}[decay]
    x = {
        "q": q,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((B, T, H, K)),
        "log_decay": None if shape is None else -0.3 * rng.exponential(size=shape),
        "beta": rng.uniform(0, 1, (B, T, H)) if delta else None,
        "initial": rng.standard_normal((B, H, N, K)),
    }
    return {name: jnp.asarray(z, jnp.float32) for name, z in x.items() if z is not None}


def results(x: dict, segments, chunk: int):
    """(y, last state, gradients of a sum that weighs every number of both)."""

    def run(x):
        y, state = recurrence(
            x["q"],
            x["k"],
            x["v"],
            log_decay=x.get("log_decay"),
            beta_BTH=x.get("beta"),
            initial_BHNK=x["initial"],
            segments_BT=segments,
            chunk=chunk,
        )
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state)), (y, state)

    (_, out), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    return out, gradients


def same(got, expected):
    def compare(g, e):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.max(jnp.abs(e)))))

    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize("name", KINDS)
def test_states_passed_on_equal_one_device(name):
    x, packed, chunk = inputs(name), name != "token_one_group", 4 if name == "delta" else 8
    segments = SEGMENTS if packed else None
    expected = results(x, segments, chunk)
    with place(data=2, context=2, tensor=2) if "group" in name else place(data=2, context=4):
        same(results(x, segments, chunk), expected)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
def test_a_convolution_reaches_over_the_cut(segments):
    conv = ShortConv((3,), ("mlp",), width=4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(conv)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, 3)), jnp.float32)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        y = nnx.merge(graph, params)(x, segments)
        return jnp.sum(jnp.sin(y)), y

    expected = jax.jit(run)(params, x)
    with place(data=2, context=4):
        same(jax.jit(lambda p, x: run(p, x))(params, x), expected)


def test_a_convolution_wider_than_a_part_is_refused():
    conv = ShortConv((3,), ("mlp",), width=6, rngs=nnx.Rngs(0))
    with place(context=8), pytest.raises(ValueError, match=r"ShortConv.width=6 reaches over more than the 4 tokens"):
        jax.eval_shape(conv, jnp.zeros((B, T, 3)))
