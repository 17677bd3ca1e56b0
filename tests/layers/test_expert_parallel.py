"""Experts on devices: every mesh gives the values, the gradients and the telemetry of one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.attention import Attention
from layers.auxiliary_router import AuxiliaryRouter
from layers.balance import LoadBalance, SignBias
from layers.block import Block
from layers.context import Context
from layers.dispatch import Capacity, Dropless
from layers.expert_choice import ExpertChoice
from layers.expert_parallel import merged
from layers.experts import Experts
from layers.mixture_of_depths import MixtureOfDepths
from layers.mlp import GatedMLP
from layers.modality_moe import ModalityMoE
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.routers import TopK
from layers.zero_experts import ZeroExperts
from maxlike import config
from maxlike.collectives import collectives
from maxlike.errors import UserError
from maxlike.program import Program
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
        return jnp.sum(jnp.square(jnp.sin(y_BTD))) + aux["loss"], (y_BTD, aux)

    return loss


def placed(where, params, names, x=X):
    """Shapes and places of parameters and tokens."""

    def place(leaf, names):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where.sharding(names, leaf.shape, "a parameter"))

    names = jax.tree.unflatten(jax.tree.structure(params), names)
    return jax.tree.map(place, params, names), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.batch(x.shape))


def run(where, loss, params, names):
    """((loss, (y, aux)), gradients) on a mesh, or on one device where it is None."""
    arrays = (params, jnp.asarray(X))
    if where is not None:
        arrays = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), arrays, placed(where, params, names))
    with axes.place_with(where):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)


@functools.cache
def alone(dispatch):
    graph, params, names = mixture(dispatch)
    return run(None, program(graph), params, names)


def assert_same(got, want):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def rows(*pairs):
    """Parameters of a test; a pair without a third part is behind the marker `meshes`."""
    return [
        pytest.param(*row[:2], id=f"{row[0]}-{'-'.join(row[1])}", marks=() if row[2:] else pytest.mark.meshes)
        for row in pairs
    ]


MESHES = rows(
    ("dropless", {"data": 2, "expert": 4}),
    ("dropless", {"expert": 8}),
    ("dropless", {"fsdp": 2, "expert": 2, "tensor": 2}, "fast"),
    ("dropless", {"data": 4, "fsdp": 2}),
    ("gather", {"fsdp": 2, "expert": 4}, "fast"),
    ("capacity", {"expert": 8}),
    ("capacity", {"fsdp": 2, "expert": 4}),
    ("capacity", {"context": 2, "expert": 2, "tensor": 2}, "fast"),
)


@pytest.mark.parametrize(("dispatch", "shape"), MESHES)
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


BLOCK = F(Block, mixer=F(Attention, heads=2), norm=RMSNorm)
CHOOSING = {
    "expert choice": F(ExpertChoice, experts=F(Experts, count=E, width=WIDTH), allow_noncausal=True),
    "sequence": F(ModalityMoE, groups=(4, 2), width=WIDTH),
    "two rows": F(ModalityMoE, groups=(2, 2), width=WIDTH, capacity_factor=2.0, routing_scope=2),
    "batch": F(ModalityMoE, groups=(4, 2), width=WIDTH, routing_scope="batch", capacity_bound=(0.4, 0.5)),
    "auxiliary": F(ModalityMoE, groups=(2, 2), width=WIDTH, auxiliary=AuxiliaryRouter, evaluation="auxiliary"),
    "depth": F(MixtureOfDepths, block=F(BLOCK, ffn=F(GatedMLP, width=WIDTH)), capacity=0.5),
    "depth of the batch": F(
        MixtureOfDepths,
        block=F(BLOCK, ffn=F(ExpertChoice, experts=F(Experts, count=4, width=4), allow_noncausal=True)),
        capacity=0.4,
        scope="batch",
        row_bound=2.0,
    ),
}
CHOOSING_MESHES = rows(
    ("expert choice", {"data": 2, "expert": 4}),
    ("expert choice", {"context": 2, "expert": 2}, "fast"),
    ("sequence", {"fsdp": 2, "expert": 2, "tensor": 2}, "fast"),
    ("two rows", {"data": 4, "expert": 2}),  # a row a device: a scope lies on two
    ("batch", {"fsdp": 4, "expert": 2}, "fast"),
    ("auxiliary", {"data": 2, "expert": 2}),
    ("depth of the batch", {"data": 2, "expert": 4}),
)


@functools.cache
def choosing(name):
    modality = jnp.asarray(np.random.default_rng(1).integers(0, 2, (B, T)))
    ctx = CTX.replace(modality_BT=modality, modalities=2, train=name != "auxiliary")
    graph, params, names = random_module(lambda rngs: CHOOSING[name](D, rngs=rngs), std=0.4)

    def loss(params, x_BTD):
        y_BTD, aux = nnx.merge(graph, params)(x_BTD, ctx)
        return jnp.sum(jnp.square(jnp.sin(y_BTD))), (y_BTD, aux)

    return loss, params, names, run(None, loss, params, names)


@pytest.mark.parametrize(("name", "shape"), CHOOSING_MESHES)
def test_experts_and_depths_choose_the_same_tokens_on_every_mesh(name, shape):
    loss, params, names, want = choosing(name)
    assert_same(run(layout(**shape), loss, params, names), want)


def moved(loss, params, names, **shape):
    """The collectives of a program."""
    where = layout(**shape)
    with axes.place_with(where):
        text = jax.jit(loss).lower(*placed(where, params, names)).compile().as_text()
    return collectives(text, where.mesh)


def test_rows_move_by_all_to_all_and_weights_and_their_gradients_not_along_the_experts():
    graph, params, names = mixture("dropless")
    gradient = jax.grad(program(graph), argnums=(0, 1), has_aux=True)
    found = moved(gradient, params, names, fsdp=2, expert=4)
    exchanged = [x for x in found if x.kind == "all-to-all"]
    forward = [x for x in exchanged if "transpose" not in x.name]
    assert (len(forward), len(exchanged)) == (3, 5) and all(x.axes == ("expert",) and x.times == 1 for x in exchanged)
    rows = 4 * (B * T // 8) * min(3, E // 4)  # the worst case of every pair of devices
    assert [x.bytes for x in exchanged if x.dtype == "f32"] == [4 * rows * D * 3 // 4] * 4
    weight = 4 * (E // 4) * D * WIDTH  # bytes of a matrix of the experts of a device
    gathered = [x for x in found if x.kind == "all-gather"]
    assert all(x.axes == ("fsdp",) for x in gathered)
    assert [x.bytes for x in gathered if "shard_map" in x.name] == [weight // 2] * 3
    scattered = [x for x in found if x.kind == "reduce-scatter"]
    assert [(x.axes, x.bytes) for x in scattered] == [(("fsdp",), weight // 2)] * 3
    # What is summed over all devices is the rest of the model, which has none of the experts' matrices.
    dense = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[0].key != "experts")
    assert sum(x.bytes for x in found if x.kind == "all-reduce") < 2 * 4 * (dense + 100)


def test_places_of_a_capacity_move_by_two_all_to_alls():
    graph, params, names = mixture("capacity")
    found = moved(program(graph), params, names, fsdp=2, expert=4)
    # ceil(0.8 T J / 11) = 2 places for each expert and row
    exchanged = [(x.axes, x.bytes) for x in found if x.kind == "all-to-all"]
    assert exchanged == [(("expert",), 4 * E * (B // 8) * 2 * D * 3 // 4)] * 2
    assert all(x.axes == ("fsdp",) for x in found if x.kind == "all-gather")


@pytest.mark.parametrize("name", ["sequence", "depth"])
def test_choices_in_rows_move_no_scores(name):
    loss, params, names, _ = choosing(name)
    found = moved(loss, params, names, data=2, expert=2)
    assert {x.kind for x in found} <= {"all-to-all", "all-reduce"}
    assert all(x.bytes < 300 for x in found if x.kind == "all-reduce"), "more than counts and telemetry"


def test_a_bounded_exchange_drops_what_finds_no_room_and_counts_it():
    build = F(MoE, router=F(TopK, top_k=2), experts=F(Experts, count=4, width=WIDTH), dispatch=F(Dropless, room=0.6))
    graph, params, names = random_module(lambda rngs: build(D, rngs=rngs), std=0.4)

    def loss(params, x_BTD):
        moe = nnx.merge(graph, params)
        y_BTD, aux = moe(x_BTD, CTX)
        return jnp.sum(y_BTD), (y_BTD, aux["dropped"], moe.router(x_BTD, CTX).index_BTJ)

    (_, (whole_BTD, none, index_BTJ)), _ = run(None, loss, params, names)
    (_, (y_BTD, dropped, _)), _ = run(layout(expert=2, data=2), loss, params, names)
    rows, lost_BT, room = B // 4, np.zeros((B, T), int), math.ceil(0.6 * (B // 4) * T)
    for first in range(0, B, rows):  # the rows of a device
        for part in range(2):  # the devices that they go to
            tokens = [(b, t) for b in range(first, first + rows) for t in range(T) if SEGMENTS[b, t]]
            sent = [(int(e), b, t) for b, t in tokens for e in index_BTJ[b, t] if e // 2 == part]
            for _, b, t in sorted(sent, key=lambda one: one[0])[room:]:
                lost_BT[b, t] += 1
    assert none == 0 and lost_BT.sum() > 0
    assert float(dropped) == pytest.approx(lost_BT.sum() / (2 * SEGMENTS.sum()))
    np.testing.assert_allclose(y_BTD[lost_BT == 0], whole_BTD[lost_BT == 0], atol=1e-5)
    assert np.abs(y_BTD - whole_BTD)[lost_BT > 0].max(-1).min() > 1e-4


@pytest.mark.large
def test_a_mixture_works_inside_a_stage_of_a_pipeline():
    graph, params, _ = mixture("dropless")
    stages = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def value(params, x_BTD):
        return jnp.square(jnp.sin(nnx.merge(graph, params)(x_BTD, CTX)[0]))

    def staged(stages, x_BTD):
        def stage(stages, x_LBTD):
            return value(jax.tree.map(lambda leaf: leaf[0], stages), x_LBTD[0])[None]

        axes_of = jax.tree.map(lambda leaf: ("layers", *(None,) * (leaf.ndim - 1)), stages)
        rows = ("layers", None, None, None)
        run = axes.shard_map(stage, over=("stage",), inputs=(axes_of, rows), outputs=rows, check=False)
        return jnp.sum(run(stages, jnp.stack([x_BTD, -x_BTD])))

    def unstaged(stages, x_BTD):
        return sum(
            jnp.sum(value(jax.tree.map(lambda leaf, i=i: leaf[i], stages), sign * x_BTD))
            for i, sign in enumerate((1, -1))
        )

    want = jax.jit(jax.value_and_grad(unstaged))(stages, jnp.asarray(X))
    with axes.place_with(layout(stage=2, expert=4)):
        assert_same(jax.jit(jax.value_and_grad(staged))(stages, jnp.asarray(X)), want)


def test_what_does_not_fit_is_refused():
    experiment = config.load("families/moe", overlays=["mesh/expert"], bindings=["experts.Experts.count = 6"])
    with pytest.raises(UserError, match=r"experts/down: .* 'experts' of size 6 .* expert=4; change Experts\.count"):
        Program.of(experiment, experiment.mesh.open())
    build = F(MoE, router=F(TopK, top_k=2), experts=F(Experts, count=6, width=4))
    graph, params, _ = random_module(lambda rngs: build(D, rngs=rngs))
    with axes.place_with(layout(expert=4)), pytest.raises(ValueError, match=r"Experts\.count=6 does not .* 4 devices"):
        jax.eval_shape(lambda: nnx.merge(graph, params)(jnp.asarray(X), CTX))
    for knobs, message in (
        ({"exchange": "broadcast"}, r"Dropless\.exchange='broadcast'"),
        ({"room": 0.0}, r"Dropless\.room=0\.0"),
        ({"room": 2.0, "exchange": "gather"}, r"Dropless\.room=2\.0 is for exchange"),
    ):
        with pytest.raises(ValueError, match=message):
            Dropless(**knobs)
