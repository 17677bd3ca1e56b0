"""Routing choices, balance losses at their known values, and the rules that move the selection bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.balance import BudgetBias, DeviceBalance, LoadBalance, SignBias, ZLoss
from layers.context import Context
from layers.expert_choice import ExpertChoice
from layers.experts import Experts
from layers.mlp import GatedMLP
from layers.routers import GroupLimit, Routing, TopK
from tests.reference import moe as reference

F = functools.partial


def test_group_limit_keeps_the_best_groups_only():
    score_BTE = jax.random.normal(jax.random.key(0), (2, 9, 12))
    for best in (1, 2):
        limited = GroupLimit(12, 3, groups=4, top_groups=2, best=best)(score_BTE)
        want = reference.open_groups(score_BTE.reshape(18, 12), 4, 2, best).reshape(2, 9, 12)
        np.testing.assert_array_equal(jnp.isfinite(limited), want)
        np.testing.assert_array_equal(limited[want], score_BTE[want])


def test_bias_chooses_but_does_not_weigh_and_has_no_gradient():
    router = TopK(4, 3, top_k=1, bias=SignBias, rngs=nnx.Rngs(params=0))
    x_BTD = jax.random.normal(jax.random.key(0), (1, 5, 4))
    router.bias[...] = jnp.array([0.0, 0.0, 9.0])
    routing = router(x_BTD, Context.of(x_BTD[..., 0]))
    assert (routing.index_BTJ == 2).all()
    np.testing.assert_allclose(routing.weight_BTJ[..., 0], routing.probability_BTE[..., 2])
    graph, state = nnx.split(router)
    loss = lambda state: jnp.sum(nnx.merge(graph, state)(x_BTD, Context.of(x_BTD[..., 0])).weight_BTJ)  # noqa: E731
    gradient = nnx.to_pure_dict(jax.grad(loss)(state))
    assert (gradient["bias"] == 0).all() and (gradient["kernel"] != 0).any()


def routing_of(index_TJ, probability_TE):
    return Routing(
        jnp.asarray(index_TJ)[None],
        jnp.ones((1, *np.shape(index_TJ))),
        probability_TE[None],
        jnp.log(probability_TE)[None],
    )


REAL = jnp.ones((1, 8), bool)


def test_load_balance_is_one_when_uniform_and_the_number_of_experts_on_collapse():
    loss = LoadBalance(4, 0, 1)
    uniform = routing_of(np.arange(8)[:, None] % 4, jnp.full((8, 4), 0.25))
    collapsed = routing_of(np.zeros((8, 1), int), jnp.tile(jnp.array([1.0, 1e-9, 1e-9, 1e-9]), (8, 1)))
    np.testing.assert_allclose(loss(uniform, REAL), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss(collapsed, REAL), 4.0, rtol=1e-6)


def test_sequence_scope_sees_the_imbalance_that_rows_cancel():
    index_BTJ = jnp.stack([jnp.zeros((8, 1), int), jnp.ones((8, 1), int)])
    probability_BTE = jax.nn.one_hot(index_BTJ[..., 0], 2)
    routing = Routing(index_BTJ, jnp.ones((2, 8, 1)), probability_BTE, probability_BTE)
    real_BT = jnp.ones((2, 8), bool)
    np.testing.assert_allclose(LoadBalance(2, 0, 1)(routing, real_BT), 1.0)
    np.testing.assert_allclose(LoadBalance(2, 0, 1, scope="sequence")(routing, real_BT), 2.0)
    # A row of padding alone is no sequence.
    np.testing.assert_allclose(LoadBalance(2, 0, 1, scope="sequence")(routing, real_BT.at[1].set(False)), 2.0)


def test_device_balance_is_one_at_the_budget():
    """4 experts on 2 devices, 2 zero experts, 3 choices of which 2 should be experts with weights."""
    index_TJ = np.array([[0, 2, 4], [1, 3, 5]] * 4)
    probability_TE = jax.nn.softmax(jax.random.normal(jax.random.key(0), (8, 6)))
    loss = DeviceBalance(4, 2, 3, groups=2, target=2.0)
    np.testing.assert_allclose(loss(routing_of(index_TJ, probability_TE), REAL), 1.0, rtol=1e-6)
    skewed = routing_of(np.array([[0, 1, 4]] * 8), probability_TE)
    P = np.asarray(probability_TE).mean(0)
    np.testing.assert_allclose(loss(skewed, REAL), 2 * (P[0] + P[1]) + P[4] + P[5], rtol=1e-5)


def test_z_loss_is_the_mean_square_of_the_normaliser():
    logits_TE = jax.random.normal(jax.random.key(0), (8, 4))
    routing = Routing(jnp.zeros((1, 8, 1), int), jnp.ones((1, 8, 1)), logits_TE[None], logits_TE[None])
    want = np.square(np.log(np.exp(np.asarray(logits_TE[:5])).sum(1))).mean()
    np.testing.assert_allclose(ZLoss(4, 0, 1)(routing, jnp.arange(8)[None] < 5), want, rtol=1e-5)


@pytest.mark.parametrize("recenter", [True, False])
def test_sign_bias_evens_out_a_skewed_router(recenter):
    rule = SignBias(4, 0, 2, rate=1e-2, recenter=recenter)
    score_TE = jax.random.uniform(jax.random.key(0), (400, 4)) * 0.4 + jnp.array([0.0, 0.1, 0.2, 0.4])

    @jax.jit
    def step(bias_E):
        index_TJ = jax.lax.top_k(score_TE + bias_E, 2)[1]
        counts_E = jnp.sum(index_TJ[..., None] == jnp.arange(4), (0, 1)).astype(jnp.float32)
        return rule(bias_E, counts_E, 0.0), jnp.max(counts_E) / 200

    bias_E = jnp.zeros(4)
    _, before = step(bias_E)
    for _ in range(100):
        bias_E, load = step(bias_E)
    assert before > 1.6 and load < 1.15
    assert not recenter or abs(float(jnp.mean(bias_E))) < 1e-5


def test_budget_bias_reaches_its_target_and_rests_there():
    N, Z, J, target = 16, 8, 4, 2.5
    rule = BudgetBias(N, Z, J, target=target)
    balanced_E = jnp.concatenate([jnp.full(N, target / N), jnp.full(Z, (J - target) / Z)]) * 1000
    np.testing.assert_allclose(rule(jnp.ones(N + Z), balanced_E, 0.0), 1.0, rtol=1e-6)
    logits_TE = jax.random.normal(jax.random.key(0), (2000, N + Z)) + 0.5 * jax.random.normal(
        jax.random.key(1), (N + Z,)
    )
    probability_TE = jax.nn.softmax(logits_TE)

    @jax.jit
    def step(bias_E):
        index_TJ = jax.lax.top_k(probability_TE + bias_E, J)[1]
        counts_E = jnp.sum(index_TJ[..., None] == jnp.arange(N + Z), (0, 1)).astype(jnp.float32)
        return rule(bias_E, counts_E, 0.0), jnp.sum(counts_E[:N]) / len(logits_TE)

    bias_E = jnp.zeros(N + Z)
    _, before = step(bias_E)
    for _ in range(400):
        bias_E, mean = step(bias_E)
    assert abs(float(before) - target) > 0.05 * target > 10 * abs(float(mean) - target)
    assert (bias_E[N:] == 0).all()


@pytest.mark.parametrize("rule", [SignBias(4, 2, 2), BudgetBias(4, 2, 2, target=1.5)])
def test_a_layer_that_counted_nothing_keeps_its_bias(rule):
    """Such as a module for multi-token prediction that the objective leaves out, or a frozen layer."""
    bias_LE = jnp.arange(12.0).reshape(2, 6)
    counts_LE = jnp.array([[0.0] * 6, [5.0, 1, 1, 1, 1, 1]])
    moved_LE = rule(bias_LE, counts_LE, 0.0)
    np.testing.assert_array_equal(moved_LE[0], bias_LE[0])
    assert moved_LE[1, 0] < bias_LE[1, 0]


def test_a_rule_works_on_the_last_axis():
    """Stack puts a layers axis in front of value and statistic."""
    counts_LE = jnp.array([[8.0, 0, 2, 2], [3.0, 3, 3, 3]])
    for rule in (SignBias(4, 0, 1), BudgetBias(2, 2, 1, target=0.5)):
        stacked = rule(jnp.zeros((2, 4)), counts_LE, 0.0)
        np.testing.assert_allclose(stacked, jnp.stack([rule(jnp.zeros(4), row, 0.0) for row in counts_LE]))


def test_rates_follow_the_run():
    """A sign's stops, a budget's falls by a cosine; neither does unless asked."""
    counts_E = jnp.array([8.0, 0, 2, 2])

    def moves(rule):
        return [float(rule(jnp.zeros(4), counts_E, jnp.float32(done))[0]) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]

    sign, budget = F(SignBias, 4, 0, 1, rate=0.01, recenter=False), F(BudgetBias, 4, 0, 1, target=1.0, rate=0.1)
    np.testing.assert_allclose(moves(sign()), -0.01, rtol=1e-6)
    np.testing.assert_allclose(moves(sign(until=0.6)), [-0.01, -0.01, -0.01, 0, 0], rtol=1e-6)
    error = 1 / 4 - 8 / 12
    np.testing.assert_allclose(moves(budget()), 0.1 * error, rtol=1e-6)
    rates = [0.01 + 0.09 * (1 + np.cos(np.pi * done)) / 2 for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(moves(budget(final_rate=0.01)), np.multiply(rates, error), rtol=1e-5)


def test_a_budget_with_a_memory_is_the_printed_pid_law_on_pooled_counts():
    """Two layers; b against its closed form after 4 updates of 3 steps each."""
    N, Z, J, every = 3, 2, 2, 3
    rule = BudgetBias(N, Z, J, target=1.5, rate=0.1, proportional=0.4, derivative=0.2, every=every)
    rng = np.random.default_rng(0)
    value, errors = jnp.zeros((2, 1 + rule.memory, N + Z)), []
    for _ in range(4):
        counts_SLE = rng.integers(0, 50, (every, 2, N + Z)).astype(np.float32)
        for step, counts_LE in enumerate(counts_SLE):
            before = value
            statistic = np.zeros(value.shape, np.float32)
            statistic[:, 0] = counts_LE
            value = rule(value, jnp.asarray(statistic), 0.0)
            assert bool((value[:, 0] == before[:, 0]).all()) == (step < every - 1)
            idle = rule(value, jnp.zeros_like(value), 0.0)
            np.testing.assert_array_equal(idle, value)
        pooled_LE = counts_SLE.sum(0)
        errors.append(1.5 / (J * N) - pooled_LE[:, :N] / pooled_LE.sum(1, keepdims=True))
    want_LN = 0.4 * errors[-1] + 0.1 * sum(errors) + 0.2 * (errors[-1] - errors[-2])
    np.testing.assert_allclose(value[:, 0, :N], want_LN, atol=1e-6)
    assert (value[:, 0, N:] == 0).all()


def test_a_router_chooses_by_the_bias_and_not_by_the_memory_of_its_rule():
    x_BTD = jax.random.normal(jax.random.key(0), (1, 5, 4))
    ctx = Context.of(x_BTD[..., 0])
    router = TopK(4, 3, 2, top_k=2, bias=F(BudgetBias, target=1.0, every=4), rngs=nnx.Rngs(params=0))
    plain = TopK(4, 3, 2, top_k=2, bias=F(BudgetBias, target=1.0), rngs=nnx.Rngs(params=0))
    bias_E = jnp.array([0.3, -0.2, 0.0, 0.0, 0.0])
    router.bias[...] = router.bias[...].at[0].set(bias_E).at[1:].set(jnp.arange(5.0))
    plain.bias[...] = bias_E
    np.testing.assert_array_equal(router(x_BTD, ctx).index_BTJ, plain(x_BTD, ctx).index_BTJ)
    graph, state = nnx.split(router)
    counts_E = jnp.arange(5.0)
    told = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state).report(x_BTD, counts_E)))(state)
    np.testing.assert_array_equal(nnx.to_pure_dict(told)["bias"], jnp.zeros((5, 5)).at[0].set(counts_E))


def expert_choice(**knobs):
    return ExpertChoice(8, experts=F(Experts, count=3, width=4), allow_noncausal=True, **knobs, rngs=nnx.Rngs(params=0))


def test_expert_choice_equals_a_loop_over_experts():
    layer = expert_choice(capacity_factor=1.2, shared=F(GatedMLP, width=4))
    x_BTD = jax.random.normal(jax.random.key(0), (2, 7, 8))
    real_BT = jnp.arange(7)[None] < jnp.array([7, 5])[:, None]
    ctx = Context.of(x_BTD[..., 0], segments_BT=real_BT.astype(jnp.int32))
    got, aux = jax.jit(lambda layer, x_BTD: layer(x_BTD, ctx))(layer, x_BTD)
    want = np.array(layer.shared(x_BTD, ctx)[0])
    visits = np.zeros((2, 7))
    for b in range(2):
        score_TE = np.asarray(jax.nn.softmax(x_BTD[b] @ layer.kernel[...]))
        y_TED = jax.jit(reference.experts)(
            x_BTD[b], layer.experts.gate[...], layer.experts.up[...], layer.experts.down[...]
        )
        for e in range(3):
            for t in sorted((t for t in range(7) if real_BT[b, t]), key=lambda t: -score_TE[t, e])[:3]:
                want[b, t] += score_TE[t, e] * y_TED[t, e]
                visits[b, t] += 1
    assert visits.sum() == 2 * 3 * 3
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(aux["unserved"], ((visits == 0) & np.asarray(real_BT)).sum() / 12)
    assert float(aux["load"]) == 1 and float(aux["dropped"]) == 0
    np.testing.assert_allclose(aux["ffn_experts"], visits.sum() / 12, rtol=1e-6)
    routed = 2 * 8 * 3 + visits.sum() / 12 * 6 * 8 * 4 + 6 * 8 * 4  # router, experts, shared
    np.testing.assert_allclose(aux["flops_per_token"], routed, rtol=1e-6)
    assert layer.flops_per_token(7) == 2 * 8 * 3 + 9 / 7 * 6 * 8 * 4 + 6 * 8 * 4


def test_expert_choice_does_not_decode():
    x_BTD = jnp.zeros((2, 3, 8))
    with pytest.raises(ValueError, match="cannot decode"):
        expert_choice()(x_BTD, Context.of(x_BTD[..., 0], lengths_B=jnp.full(2, 3)))


@pytest.mark.parametrize(
    ("build", "knob"),
    [
        (F(SignBias, 4, 0, 2, rate=0.0), "SignBias.rate=0.0"),
        (F(BudgetBias, 4, 2, 2, target=0.0), "BudgetBias.target=0.0"),
        (F(BudgetBias, 4, 2, 2, target=2.5), "BudgetBias.target=2.5"),
        (F(BudgetBias, 4, 0, 2, target=1.5), "BudgetBias.target=1.5"),
        (F(BudgetBias, 4, 2, 2, target=1.5, rate=-1.0), "BudgetBias.rate=-1.0"),
        (F(BudgetBias, 4, 2, 2, target=1.5, final_rate=0.2), "BudgetBias.final_rate=0.2"),
        (F(BudgetBias, 4, 2, 2, target=1.5, proportional=-1.0), "BudgetBias.proportional=-1.0"),
        (F(BudgetBias, 4, 2, 2, target=1.5, derivative=-1.0), "BudgetBias.derivative=-1.0"),
        (F(BudgetBias, 4, 2, 2, target=1.5, every=0), "BudgetBias.every=0"),
        (F(SignBias, 4, 0, 2, until=0.0), "SignBias.until=0.0"),
        (F(LoadBalance, 4, 0, 2, coefficient=0.0), "LoadBalance.coefficient=0.0"),
        (F(LoadBalance, 4, 0, 2, scope="device"), "LoadBalance.scope='device'"),
        (F(ZLoss, 4, 0, 2, coefficient=-1.0), "ZLoss.coefficient=-1.0"),
        (F(DeviceBalance, 4, 0, 2, groups=3, target=2.0), "DeviceBalance.groups=3"),
        (F(DeviceBalance, 4, 0, 2, groups=2, target=1.0), "DeviceBalance.target=1.0"),
        (F(DeviceBalance, 4, 2, 2, groups=2, target=2.0), "DeviceBalance.target=2.0"),
        (F(expert_choice, capacity_factor=3.5), "ExpertChoice.capacity_factor=3.5"),
        (F(expert_choice, std=0.0), "ExpertChoice.std=0.0"),
        (F(ExpertChoice, 8, experts=F(Experts, count=3, width=4), rngs=nnx.Rngs(0)), "ExpertChoice.allow_noncausal"),
    ],
)
def test_bad_knobs_are_refused_by_name(build, knob):
    with pytest.raises(ValueError, match=knob):
        build()
