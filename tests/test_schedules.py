"""Schedules against closed forms, optax and each other. Steps are tiny; `rates` evaluates a whole run in one vmap."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxlike.errors import UserError
from maxlike.schedules import WSD, Clock, Constant, Cosine, InverseSqrt, Linear, Power, tail

TAILS = ("linear", "1-sqrt", "exponential", "cosine")
CLOCK = Clock(steps=100, tokens_per_step=1000)


def rates(schedule, clock, counts=None):
    counts = np.arange(clock.steps) if counts is None else np.asarray(counts)
    return np.asarray(jax.jit(jax.vmap(schedule(clock)))(counts))


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(20, 20), ("20 steps", 20), ("2e4 tokens", 20), ("20 %", 20), ("20%", 20), (0, 0), ("1500 tokens", 1.5)],
)
def test_durations(duration, steps):
    assert CLOCK.in_steps(duration, "X.warmup") == steps


@pytest.mark.parametrize(
    "duration", [-1, "20", "20 epochs", "many steps", "-5 %", "inf steps", "nan tokens", 2.5, True]
)
def test_a_bad_duration_is_refused_by_name(duration):
    with pytest.raises(UserError, match=r"WSD\.warmup"):
        WSD(lr=1.0, warmup=duration)(CLOCK)


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_tail_starts_at_one_ends_at_its_floor_and_stays_there(kind, floor):
    u = jnp.linspace(0, 1, 101)
    values = np.asarray(tail(kind, u, floor))
    assert values[0] == pytest.approx(1.0, abs=1e-7)
    assert values[-1] == pytest.approx(floor, abs=1e-7)
    assert np.all(np.diff(values) < 0)
    assert float(tail(kind, jnp.float32(7.0), floor)) == pytest.approx(floor, abs=1e-7)


def test_the_exponential_tail_is_the_published_formula():
    e, u, r = math.e, 0.5, 0.2
    assert float(tail("exponential", jnp.float32(u), 0.0)) == pytest.approx(0.3775, abs=5e-5)
    published = (1 - r) * e / (e - 1) * math.exp(-u) + (r * e - 1) / (e - 1)
    assert float(tail("exponential", jnp.float32(u), r)) == pytest.approx(published, rel=1e-6)


def test_cosine_and_linear_agree_with_optax():
    counts = np.arange(100)
    cosine = optax.warmup_cosine_decay_schedule(0.0, 0.3, warmup_steps=10, decay_steps=100, end_value=0.03)
    np.testing.assert_allclose(rates(Cosine(lr=0.3, warmup=10), CLOCK), jax.vmap(cosine)(counts + 1), atol=1e-7)
    linear = optax.join_schedules([optax.linear_schedule(0, 0.3, 10), optax.linear_schedule(0.3, 0.0, 90)], [10])
    np.testing.assert_allclose(rates(Linear(lr=0.3, warmup=10), CLOCK), jax.vmap(linear)(counts + 1), atol=1e-7)


def test_wsd_agrees_with_optax():
    parts = [optax.linear_schedule(0, 0.3, 10), optax.constant_schedule(0.3), optax.linear_schedule(0.3, 0.0, 20)]
    expected = jax.vmap(optax.join_schedules(parts, [10, 80]))(np.arange(100) + 1)
    np.testing.assert_allclose(rates(WSD(lr=0.3, warmup="1e4 tokens", decay="20 %"), CLOCK), expected, atol=1e-7)


def test_constant_warms_up_from_above_zero():
    np.testing.assert_allclose(rates(Constant(lr=0.5, warmup=4), CLOCK, range(6)), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert rates(Constant(lr=0.5), CLOCK, [0]) == 0.5


def test_inverse_sqrt_closed_forms():
    schedule = InverseSqrt(lr=2.0, warmup=10, scale=5, cooldown=20, decay_floor=0.2, cooldown_floor=0.1)
    got = rates(schedule, CLOCK) / 2.0

    def decayed(t):
        return 0.2 + 0.8 / math.sqrt((t - 10 + 5) / 5)

    assert got[9] == pytest.approx(1.0)  # t = T_w
    assert got[49] == pytest.approx(decayed(50), rel=1e-6)
    assert got[79] == pytest.approx(decayed(80), rel=1e-6)  # continuous where the cooldown starts
    assert got[89] == pytest.approx((decayed(80) + 0.1) / 2, rel=1e-6)
    assert got[99] == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens_per_sequence_step", "tokens", "expected"),
    [
        (1024, 2.55e10, 0.02),
        (1024, 1e11, 1.005e-2),
        (1024, 1e12, 3.107e-3),
        (1024, 1e13, 9.60e-4),
        (128, 4.3e8, 0.02),
        (128, 1e10, 4.067e-3),
    ],
)
def test_power_gives_the_published_values(tokens_per_sequence_step, tokens, expected):
    tokens_per_step = tokens_per_sequence_step * 4096
    clock = Clock(steps=10**8, tokens_per_step=tokens_per_step)
    count = round(tokens / tokens_per_step) - 1
    got = rates(Power(warmup="1e8 tokens"), clock, [count])[0]
    assert got == pytest.approx(expected, rel=3e-3 if tokens < 1e9 else 6e-4)


def test_power_leaves_its_cap_where_the_paper_says():
    for beta, tokens in ((1024, 2.60e10), (128, 4.4e8)):
        clock = Clock(steps=10**8, tokens_per_step=beta * 4096)
        count = int(tokens / clock.tokens_per_step)
        before, after = rates(Power(warmup=10), clock, [int(count * 0.97), int(count * 1.03)])
        assert before == pytest.approx(0.02, rel=1e-6)
        assert after < 0.02 * 0.999


@pytest.mark.parametrize("eta_max", [0.02, 1e3])  # capped, and on the power law
def test_power_is_continuous_at_both_joints(eta_max):
    rate = jax.jit(Power(warmup=4, decay=8, eta_max=eta_max)(Clock(steps=16, tokens_per_step=2**22)))
    for joint in (4.0, 8.0):
        before, at = rate(joint - 1 - 1e-6), rate(joint - 1)  # the rate takes t = count + 1
        assert abs(float(before) - float(at)) < 1e-6 * float(at)


def test_power_falls_after_its_warmup_and_stays_at_its_floor():
    clock = Clock(steps=4000, tokens_per_step=2**19)
    got = rates(Power(warmup=500, decay=400), clock)
    assert np.all(np.diff(got[499:]) <= 0)
    assert got[700] == pytest.approx(0.02) and got[3500] < 0.019
    floored = rates(Power(warmup=500, decay=400, floor=0.25), clock, [3599, 3999, 5000, 2**31 - 1])
    np.testing.assert_allclose(floored[1:], 0.25 * floored[0], rtol=1e-6)


def test_power_does_not_know_how_long_the_run_is():
    short, long = Clock(steps=200, tokens_per_step=2**22), Clock(steps=1000, tokens_per_step=2**22)
    schedule = Power(warmup="2e8 tokens", decay="5e7 tokens")
    shared = 200 - math.ceil(5e7 / 2**22)
    np.testing.assert_array_equal(rates(schedule, short)[:shared], rates(schedule, long)[:shared])
    assert rates(schedule, short)[-1] < rates(schedule, long)[199]


EVERY = [
    Constant(lr=0.1, warmup=3),
    Linear(lr=0.1, warmup=3),
    Cosine(lr=0.1, warmup=3),
    *(WSD(lr=0.1, warmup=3, tail=kind) for kind in TAILS),
    InverseSqrt(lr=0.1, warmup=3, scale=3, cooldown=10, decay_floor=0.1),
    InverseSqrt(lr=0.1, warmup=0, scale=3),
    Power(warmup=3, decay=10),
    Power(warmup=0),
]


@pytest.mark.parametrize("schedule", EVERY, ids=lambda schedule: type(schedule).__name__)
def test_every_schedule_is_float32_finite_and_the_same_under_jit(schedule):
    rate = schedule(CLOCK)
    counts = np.array([0, 1, 2, 3, 50, 98, 99, 100, 2**24, 2**31 - 1], np.int32)
    got = jax.jit(jax.vmap(rate))(counts)
    assert got.dtype == jnp.float32
    assert np.all(np.isfinite(got)) and np.all(np.asarray(got) >= 0)
    assert got[0] > 0
    np.testing.assert_allclose(got, [rate(count) for count in counts], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "knob"),
    [
        (lambda: Constant(lr=0.0), "Constant.lr"),
        (lambda: Constant(lr=math.nan), "Constant.lr"),
        (lambda: Linear(lr=1.0, min_ratio=1.5), "Linear.min_ratio"),
        (lambda: WSD(lr=1.0, tail="quartic"), "WSD.tail"),
        (lambda: WSD(lr=1.0, floor=-0.1), "WSD.floor"),
        (lambda: WSD(lr=1.0, warmup="60 %", decay="50 %")(CLOCK), "WSD.warmup"),
        (lambda: Cosine(lr=1.0, warmup=101)(CLOCK), "Cosine.warmup"),
        (lambda: InverseSqrt(lr=1.0, warmup="10 %", scale=5)(CLOCK), "InverseSqrt.warmup"),
        (lambda: InverseSqrt(lr=1.0, warmup=1, scale=0)(CLOCK), "InverseSqrt.scale"),
        (lambda: InverseSqrt(lr=1.0, warmup=1, scale=1, cooldown_floor=0.1), "InverseSqrt.cooldown_floor"),
        (lambda: Power(a=0.0), "Power.a"),
        (lambda: Power(b=0.1), "Power.b"),
        (lambda: Power(eta_max=0.0), "Power.eta_max"),
        (lambda: Power(warmup="10 %")(CLOCK), "Power.warmup"),
        (lambda: Power(warmup=90, decay=20)(CLOCK), "Power.warmup"),
        (lambda: Clock(steps=0, tokens_per_step=1), "Clock.steps"),
        (lambda: Clock(steps=1, tokens_per_step=0), "Clock.tokens_per_step"),
    ],
)
def test_refusals_name_the_knob(make, knob):
    with pytest.raises(UserError, match=knob.replace(".", r"\.")):
        make()
