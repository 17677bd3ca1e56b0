"""Experts on devices: every mesh gives the values, the gradients and the telemetry of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.balance import LoadBalance, SignBias
from layers.context import Context
from layers.dispatch import Capacity, Dropless
from layers.expert_parallel import merged
from layers.experts import Experts
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.routers import TopK
from layers.zero_experts import ZeroExperts
from maxlike import config
from maxlike.collectives import collectives
from maxlike.sharding import Mesh
from tests.reference.random import random_module

F = functools.partial
B, T, D, E, WIDTH = 8, 6, 16, 8, 12
RULES = config.load("families/moe").mesh.rules
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, D)).astype(np.float32)
SEGMENTS = np.where(np.arange(T) < RNG.integers(3, T + 1, (B, 1)), 1, 0)
CTX = Context.of(jnp.zeros((B, T)), segments_BT=jnp.asarray(SEGMENTS), train=True)
DISPATCH = {
    "dropless": Dropless,
    "gather": F(Dropless, exchange="gather"),
    "capacity": F(Capacity, factor=0.8, minimum=1),
}


def layout(rules=RULES, **shape):
    return Mesh(shape=shape, rules=rules).open()


@functools.cache
def mixture(dispatch, **knobs):
    """Selection bias, zero experts of two kinds, a gated shared feed-forward, two losses."""
    build = F(
        MoE,
        router=F(TopK, top_k=3, score="sigmoid", bias=SignBias),
        experts=F(Experts, count=E, width=WIDTH),
        zero_experts=F(ZeroExperts, identity=2, constant=1),
        shared=F(GatedMLP, width=4),
        shared_gate=True,
        losses=(F(LoadBalance, coefficient=1e-3),),
        dispatch=DISPATCH[dispatch],
    )
    graph, params, names = random_module(lambda rngs: F(build, **knobs)(D, rngs=rngs), std=0.4)
    return graph, jax.tree.map(jnp.asarray, params), names


def program(graph, ctx=CTX):
    def loss(params, x_BTD):
        y_BTD, aux = nnx.merge(graph, params)(x_BTD, ctx)
        return jnp.sum(jnp.sin(y_BTD)) + aux["loss"], (y_BTD, aux)

    return loss


def run(where, loss, params, names, x=X):
    """((loss, (y, aux)), gradients) on a mesh (None: one device), every array placed as the rules say."""
    if where is not None:
        put = lambda leaf, axes_: jax.device_put(leaf, where.sharding(axes_, leaf.shape, "a parameter"))  # noqa: E731
        params = jax.tree.map(put, params, jax.tree.unflatten(jax.tree.structure(params), names))
        x = jax.device_put(x, where.batch(x.shape))
    with axes.place_with(where):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, jnp.asarray(x))


@functools.cache
def alone(dispatch):
    graph, params, names = mixture(dispatch)
    return run(None, program(graph), params, names)


def assert_same(got, want):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


MESHES = [
    ("dropless", {"expert": 2}),
    ("dropless", {"data": 2, "expert": 4}),
    ("dropless", {"expert": 8}),
    ("dropless", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ("dropless", {"data": 4, "fsdp": 2}),
    ("gather", {"fsdp": 2, "expert": 4}),
    ("capacity", {"expert": 2}),
    ("capacity", {"expert": 8}),
    ("capacity", {"fsdp": 2, "expert": 4}),
    ("capacity", {"context": 2, "expert": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("dispatch", "shape"), MESHES, ids=lambda x: "-".join(x) if isinstance(x, dict) else x)
def test_every_mesh_equals_one_device(dispatch, shape):
    graph, params, names = mixture(dispatch)
    want = alone(dispatch)
    assert float(want[0][1][1]["dropped"]) > 0 or dispatch != "capacity"
    assert_same(run(layout(**shape), program(graph), params, names), want)


def test_rows_merge_in_the_order_of_experts():
    for sizes_PE in ([[2, 0, 1], [0, 0, 0], [1, 4, 0], [0, 0, 5]], [[0, 0], [0, 0]], [[3]]):
        sizes_PE, room = np.array(sizes_PE), 5
        rows = [(e, p, r) for p, n in enumerate(sizes_PE) for r, e in enumerate(np.repeat(np.arange(n.size), n))]
        want = np.full(sizes_PE.shape[0] * room, sizes_PE.shape[0] * room)
        for place, (_, p, r) in enumerate(sorted(rows)):
            want[p * room + r] = place
        np.testing.assert_array_equal(merged(jnp.asarray(sizes_PE), room), want)
