"""Modality-aware expert choice against a loop over experts, and what each modality may not do to the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.auxiliary_router import AuxiliaryRouter
from layers.context import Context
from layers.mlp import GatedMLP
from layers.modality_moe import ModalityMoE
from layers.selection import best, compact, share
from tests.reference.modality import MODALITY, RNG, SEGMENTS, B, D, T, W, X, context, layer, loops, silu
from tests.reference.moma import expert_choice, sigmoid
from tests.reference.random import random_module

KNOBS = [
    {"groups": (4, 3)},
    {"groups": (4, 4), "capacity_factor": 2.0, "routing_scope": "batch"},
    {"groups": (1, 3), "routing_scope": "batch"},
    {"groups": (1, 1)},
    {"groups": (5,), "routing_scope": 1},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=lambda knobs: "-".join(map(str, knobs["groups"])))
def test_equals_a_loop_over_experts(knobs):
    _, params, call = layer(**knobs)
    got, aux = call(params, X, context())
    rows = (lambda z: z.reshape(1, B * T, *z.shape[2:])) if knobs.get("routing_scope") == "batch" else (lambda z: z)
    expected, counts = [], np.zeros((B, T)).reshape(rows(SEGMENTS).shape)
    for s, (x_ND, modality_N, real_N) in enumerate(zip(rows(X), rows(MODALITY), rows(SEGMENTS) > 0)):
        y_ND, chosen = expert_choice(x_ND, loops(params), modality_N, real_N, knobs.get("capacity_factor", 1.0))
        expected.append(y_ND)
        for tokens in chosen.values():
            counts[s, tokens] += 1
    np.testing.assert_allclose(got, np.concatenate(expected).reshape(B, T, D), atol=2e-5)
    unselected = (counts == 0)[rows(SEGMENTS) > 0].mean()
    assert float(aux["unselected"]) == pytest.approx(unselected) and float(aux["dropped"]) == 0
    assert float(aux["max_load"]) == pytest.approx(1)
    visited, real = counts.sum() / (SEGMENTS > 0).sum(), SEGMENTS > 0
    assert float(aux["ffn_experts"]) == pytest.approx(visited)
    routers = 2 * D * sum(count for count in knobs["groups"] if count > 1)
    assert float(aux["flops_per_token"]) == pytest.approx(routers + visited * 6 * D * W)
    entropy_BT = np.zeros((B, T))
    for m, group in enumerate(loops(params)):
        if "router" in group:
            share = sigmoid(X @ group["router"])
            share = share / share.sum(-1, keepdims=True)
            own = (m == MODALITY) | (len(knobs["groups"]) == 1)
            entropy_BT += np.where(own, -(share * np.log(share)).sum(-1), 0)
    assert float(aux["entropy"]) == pytest.approx(entropy_BT[real].mean(), rel=1e-4, abs=1e-6)


def test_one_expert_each_is_two_dense_networks_chosen_by_modality():
    _, params, call = layer(groups=(1, 1))
    got, _ = call(params, X, context(segments=None))
    dense = []
    for m in sorted(params["groups"]):
        experts = params["groups"][m]["experts"]
        graph, kernels, _ = random_module(lambda rngs: GatedMLP(D, width=W, rngs=rngs))
        assert kernels.keys() == {"gate", "up", "down"}
        mlp = nnx.merge(graph, {name: {"kernel": experts[name][0]} for name in kernels})
        dense.append(jax.jit(lambda x_BTD, mlp=mlp: mlp(x_BTD, None)[0])(X))
    np.testing.assert_allclose(got, np.where(MODALITY[..., None] == 1, dense[1], dense[0]), atol=2e-6)


def test_all_experts_on_all_tokens_is_a_weighted_sum():
    """capacity_factor = E and shared weights: both groups give the dense sum of sigmoid-weighted experts."""
    _, params, call = layer(groups=(3, 3), capacity_factor=3.0)
    first = min(params["groups"])
    params = {"groups": dict.fromkeys(params["groups"], params["groups"][first])}
    got, _ = call(params, X, context(segments=None))
    group = params["groups"][first]
    gate = silu(np.einsum("btd,edf->btef", X, group["experts"]["gate"]))
    h = gate * np.einsum("btd,edf->btef", X, group["experts"]["up"])
    y = np.einsum("btef,efd,bte->btd", h, group["experts"]["down"], sigmoid(X @ group["router"]))
    np.testing.assert_allclose(got, y, atol=2e-5)


def test_a_permutation_of_the_scope_permutes_the_outputs():
    _, params, call = layer(groups=(4, 3))
    order = RNG.permutation(T)
    plain, _ = call(params, X, context())
    moved, _ = call(params, X[:, order], context(MODALITY[:, order], SEGMENTS[:, order]))
    np.testing.assert_allclose(moved, plain[:, order], atol=1e-6)


def test_a_modality_that_does_not_occur_lowers_no_mean():
    graph, params, call = layer(groups=(4, 3), auxiliary=AuxiliaryRouter)
    _, aux = call(params, X, context(np.zeros((B, T), int)))
    group = jax.jit(lambda params, *x: nnx.merge(graph, params).groups[0].by_choice(*x, None, B).agreement)
    for name, value in group(params, X, SEGMENTS > 0).items():
        assert float(aux[name]) == pytest.approx(float(value), rel=1e-5) and value > 0


def test_images_do_not_touch_text():
    _, params, call = layer(groups=(4, 3))
    plain, _ = call(params, X, context())
    other, _ = call(params, np.where(MODALITY[..., None] == 1, 3 - X, X), context())
    text = (MODALITY == 0) & (SEGMENTS > 0)
    np.testing.assert_array_equal(plain[text], other[text])
    assert np.abs(plain - other)[(MODALITY == 1) & (SEGMENTS > 0)].max() > 0.1


def test_padding_is_not_routed_and_gets_nothing():
    _, params, call = layer(groups=(4, 3))
    plain, _ = call(params, X, context())
    huge, _ = call(params, np.where(SEGMENTS[..., None] > 0, X, 1e4), context())
    np.testing.assert_array_equal(plain, huge)
    assert not np.asarray(plain)[SEGMENTS == 0].any()


def test_choices_beyond_the_buffer_are_dropped_and_counted():
    knobs = {"groups": (2, 2), "routing_scope": "batch"}
    whole = layer(**knobs)[2](layer(**knobs)[1], X, context(np.zeros((B, T), int), None))
    _, params, call = layer(**knobs, capacity_bound=(0.5, 0.5))
    exact, aux = call(params, X, context(np.arange(B * T).reshape(B, T) % 2, None))
    np.testing.assert_allclose(
        exact, layer(**knobs)[2](params, X, context(np.arange(B * T).reshape(B, T) % 2, None))[0]
    )
    assert float(aux["dropped"]) == 0
    bounded, aux = call(params, X, context(np.zeros((B, T), int), None))  # all tokens are text: half find no room
    assert float(aux["dropped"]) == pytest.approx(0.5)
    assert not np.array_equal(bounded, whole[0])


def test_ties_go_to_the_earlier_token():
    scores = jnp.asarray([[0.0, 1.0, 1.0, 1.0, -jnp.inf, 1.0]])
    index, taken = best(scores, jnp.asarray([3]), 4)
    np.testing.assert_array_equal(index[0], [1, 2, 3, 5])
    np.testing.assert_array_equal(taken[0], [True, True, True, False])
    np.testing.assert_array_equal(compact(jnp.asarray([[False, True, False, True]]), 3), [[1, 3, 4]])


def test_shares_are_floors_of_exact_products():
    assert int(share(jnp.asarray(100), 0.29)) == 29  # 0.29 * 100 is 28.999999999999996
    counts = np.arange(0, 300_000, 997)
    np.testing.assert_array_equal(share(jnp.asarray(counts), 1 / 3), counts // 3)
    np.testing.assert_array_equal(share(jnp.asarray(counts), 1.25 / 4), counts * 5 // 16)
    assert int(share(jnp.asarray(2_000_000_000), 0.9999)) == 1_999_800_000  # no overflow on the way


def test_noise_is_logistic_in_training_alone():
    """With one expert's weight 1 on everything and every token taken, the gate shows the noisy score itself."""
    big = 4096
    graph, params, _ = random_module(
        lambda rngs: ModalityMoE(2, groups=(2,), width=1, capacity_factor=2.0, router_noise="gumbel_sigmoid", rngs=rngs)
    )
    (index,) = params["groups"]
    ones, first = np.ones((2, 2, 1), np.float32), np.asarray([[[1, 0]], [[0, 1]]], np.float32)  # expert e writes y[e]
    experts = {"gate": ones, "up": ones, "down": first}
    params = {"groups": {index: {"experts": experts, "router": np.zeros((2, 2), np.float32)}}}
    model, x = nnx.merge(graph, params), np.full((1, big, 2), 0.5, np.float32)
    value = 1 / (1 + np.exp(-1.0))  # silu of 1
    run = jax.jit(model.__call__)

    def scores(**fields):
        gate = np.asarray(run(x, Context.of(x[..., 0], **fields))[0]) / value
        return np.log(gate / (1 - gate))

    noisy = scores(train=True, key=jax.random.key(1))
    assert scipy.stats.kstest(noisy.ravel(), "logistic").pvalue > 0.01
    assert noisy.mean() == pytest.approx(0, abs=0.1) and noisy.var() == pytest.approx(np.pi**2 / 3, rel=0.06)
    assert abs(np.corrcoef(noisy[0].T)[0, 1]) < 0.05
    for fields in ({"key": jax.random.key(1)}, {"train": True}):
        np.testing.assert_allclose(scores(**fields), 0, atol=1e-5)


def test_gradients_reach_router_and_experts_of_the_chosen():
    graph, params, _ = layer(groups=(4, 3))

    def loss(params, x):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x, context())[0]))

    g_params, g_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(g_params))
    assert not np.asarray(g_x)[SEGMENTS == 0].any()
    direction, eps = RNG.normal(size=X.shape).astype(np.float32), 1e-3  # small enough to leave every choice as it is
    value = jax.jit(loss)
    slope = (value(params, X + eps * direction) - value(params, X - eps * direction)) / (2 * eps)
    assert float(np.sum(g_x * direction)) == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"groups": (4, 0)}, r"ModalityMoE\.groups=\(4, 0\) needs at least 1 expert"),
        ({"groups": ()}, r"ModalityMoE\.groups"),
        ({"groups": (4, 3), "capacity_factor": 3.5}, r"capacity_factor=3.5 must be above 0 and at most 3"),
        ({"groups": (4, 4), "capacity_factor": 0.0}, r"capacity_factor=0.0"),
        ({"groups": (1, 1), "capacity_factor": 0.5}, r"capacity_factor=0.5"),
        ({"groups": (4, 4), "capacity_bound": (0.5,)}, r"capacity_bound=\(0.5,\) needs a share"),
        ({"groups": (4, 4), "capacity_bound": (0.5, 1.5)}, r"capacity_bound"),
        ({"groups": (4, 4), "routing_scope": "shard"}, r"routing_scope='shard'"),
        ({"groups": (4, 4), "routing_scope": 0}, r"routing_scope=0"),
        ({"groups": (4, 4), "router_noise": "gaussian"}, r"router_noise='gaussian'"),
        ({"groups": (4, 4), "evaluation": "auxiliary"}, r"evaluation='auxiliary' needs ModalityMoE\.auxiliary"),
        ({"groups": (4, 4), "evaluation": "causal"}, r"evaluation='causal'"),
    ],
)
def test_refused_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        ModalityMoE(D, width=W, **knobs, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("knobs", "fields", "message"),
    [
        ({"groups": (2, 2)}, {"lengths_B": jnp.ones(B, int)}, r"ModalityMoE\.auxiliary is None"),
        ({"groups": (2, 2)}, {"modality_BT": None}, r"LanguageModel\.modality_starts"),
        ({"groups": (2, 2)}, {"modalities": 3}, r"ModalityMoE\.groups=\(2, 2\) must name as many .* 3, or one for all"),
        ({"groups": (2, 2), "routing_scope": 3}, {}, r"routing_scope=3 does not divide a batch of 2 rows"),
    ],
)
def test_refused_calls(knobs, fields, message):
    graph, params, _ = layer(**knobs)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: nnx.merge(graph, params)(jnp.asarray(X), context(**fields)))


def test_sharded_experts_and_rows_equal_one_device():
    graph, params, call = layer(groups=(4, 2))
    mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

    def place(path, leaf):
        names = jax.tree_util.keystr(path)
        spec = P("expert") if "experts" in names else P(None, "expert")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, params)
    rows = NamedSharding(mesh, P("data"))
    x, ctx = jax.device_put(X, rows), jax.tree.map(lambda leaf: jax.device_put(leaf, rows), context())

    def loss(params, x, ctx):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x, ctx)[0]))

    np.testing.assert_allclose(call(placed, x, ctx)[0], call(params, X, context())[0], atol=2e-5)
    gradient = jax.jit(jax.grad(loss))
    got, expected = gradient(placed, x, ctx), gradient(params, jnp.asarray(X), context())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), got, expected)
