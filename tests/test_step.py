"""The pure step: micro-batches, the guard, averaging, clipping, and every mesh give what one device in one go gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers import axes
from layers.context import Context
from maxlike.errors import UserError
from maxlike.guard import Guard
from maxlike.metrics import Mean
from maxlike.model import AbstractModel, split
from maxlike.step import Step


class Bigram(nnx.Module):
    """The smallest network with an embedding and a matrix."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.table = axes.param(rngs, (11, 8), ("vocab", "embed"))
        self.out = axes.param(rngs, (8, 11), ("embed", "vocab"))

    def __call__(self, tokens_BT, ctx: Context):
        return jnp.take(self.table[...], tokens_BT, axis=0) @ self.out[...]


def objective(model, batch, key):
    ctx = Context(positions_BT=batch["positions"], segments_BT=batch["segment_ids"], key=key)
    logits = model(batch["inputs"], ctx).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * batch["loss_weights"]
    loss = Mean(nats.sum(), batch["loss_weights"].sum())
    return loss, {"loss": loss}


def batch(seed=0, rows=8, length=6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 11, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32)  # rows of unequal weight
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": weights,
        "target_bytes": np.ones((rows, length), np.int32),
    }


def begin(network, step, optimizer):
    """(abstract model, state of step 0)."""
    _, params, buffers = split(network, jax.random.key(0))
    state = step.init(nnx.to_pure_dict(params), nnx.to_pure_dict(buffers), optimizer, jnp.uint32(0))
    return AbstractModel.of(network), state


def start(step, optimizer):
    model, state = begin(Bigram, step, optimizer)
    update = jax.jit(
        functools.partial(step.update, model=model, objective=objective, optimizer=optimizer, progress=0.0)
    )
    return state, update


def run(step, batches, optimizer=None, allow=True):
    state, update = start(step, optimizer or optax.adam(1e-2))
    rows = []
    for one in batches:
        state, metrics = update(state, one, jnp.bool_(allow))
        rows.append(metrics)
    return state, rows


def assert_close(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_weigh_by_tokens(parts):
    batches = [batch(i) for i in range(3)]
    whole, rows = run(Step(), batches)
    cut, cut_rows = run(Step(micro_batches=parts), batches)
    assert_close(whole["params"], cut["params"])
    assert_close(rows, cut_rows)


def poisoned():
    bad = batch(1)
    bad["loss_weights"] = bad["loss_weights"] * np.float32(np.nan)
    return bad


def test_a_bad_step_changes_nothing_but_the_counters():
    good = run(Step(ema_decay=0.9), [batch(0)])[0]
    skipped, rows = run(Step(ema_decay=0.9), [batch(0), poisoned(), poisoned()])
    for name in ("params", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, good[name], skipped[name])
    assert [bool(row["bad"]) for row in rows] == [False, True, True]
    assert int(rows[-1]["skipped"]) == int(rows[-1]["bad_in_a_row"]) == 2
    assert int(skipped["step"]) == 3
    _, rows = run(Step(), [poisoned(), batch(0)])
    assert int(rows[-1]["bad_in_a_row"]) == 0 and int(rows[-1]["skipped"]) == 1


def test_a_step_that_is_not_allowed_is_dropped():
    state, _ = start(Step(), optax.adam(1e-2))
    dropped, rows = run(Step(), [batch(0)], allow=False)
    jax.tree.map(np.testing.assert_array_equal, state["params"], dropped["params"])
    assert not bool(rows[0]["bad"])


def test_a_spike_is_bad_only_after_the_loss_has_settled():
    guard = Guard(spike_sigmas=6.0)
    judge = jax.jit(guard.judge)
    watch, one, allow = guard.init(), jnp.float32(1), jnp.bool_(True)
    assert not judge(watch, jnp.float32(1e9), one, allow)[0]
    rng = np.random.default_rng(0)
    for _ in range(80):
        bad, watch = judge(watch, jnp.float32(3 + 0.1 * rng.standard_normal()), one, allow)
        assert not bad
    assert abs(float(watch["mean"]) - 3) < 0.1 and 0.03 < float(watch["variance"]) ** 0.5 < 0.3
    assert not judge(watch, jnp.float32(3.2), one, allow)[0]
    assert judge(watch, jnp.float32(5.0), one, allow)[0]
    assert judge(watch, jnp.float32(3.0), jnp.float32(np.inf), allow)[0]


def test_ema_and_clip_follow_their_formulas():
    state, _ = run(Step(ema_decay=0.9, clip_norm=1e-3), [batch(0)], optimizer=optax.sgd(1.0))
    first, _ = start(Step(), optax.sgd(1.0))
    moved = jax.tree.map(jnp.subtract, state["params"], first["params"])
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-4)
    assert_close(state["ema"], jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, first["params"], state["params"]))


def test_bfloat16_compute_keeps_float32_state():
    state, rows = run(Step(compute_dtype="bfloat16"), [batch(0)])
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    np.testing.assert_allclose(rows[0]["loss"], run(Step(), [batch(0)])[1][0]["loss"], rtol=2e-2)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"micro_batches": 0}, "Step.micro_batches=0"),
        ({"clip_norm": 0.0}, "Step.clip_norm=0.0"),
        ({"ema_decay": 1.0}, "Step.ema_decay=1.0"),
    ],
)
def test_step_refuses(knobs, message):
    with pytest.raises(UserError, match=message):
        Step(**knobs)


@pytest.mark.parametrize("knobs", [{"patience": 0}, {"spike_sigmas": 0.0}])
def test_guard_refuses(knobs):
    with pytest.raises(UserError, match=r"Guard\."):
        Guard(**knobs)


@dataclasses.dataclass(frozen=True)
class Towards:
    """A rule that moves a buffer part of the way to its statistic."""

    rate: float

    def __call__(self, value, statistic):
        return value + self.rate * (statistic - value)


class Watched(Bigram):
    """Two stacked buffers follow the mean of the token ids; a remat scan lies between them and the loss."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.seen = axes.buffer(jnp.zeros((2, 1)), ("layers", "experts"), Towards(0.5))
        self.fixed = axes.buffer(jnp.ones(3), ("experts",))

    def __call__(self, tokens_BT, ctx: Context):
        y = super().__call__(tokens_BT, ctx) * self.fixed[...][0]
        mean = jnp.mean(tokens_BT.astype(jnp.float32))

        @jax.checkpoint
        def body(y, xs):
            value, index = xs
            return axes.measure(y, value, (mean + index)[None]), None

        return jax.lax.scan(body, y, (self.seen[...], jnp.arange(2.0)))[0]


@pytest.mark.parametrize("parts", [1, 2])
def test_buffers_follow_their_rules_with_statistics_of_the_whole_batch(parts):
    step, optimizer = Step(micro_batches=parts), optax.sgd(0.1)
    model, state = begin(Watched, step, optimizer)
    update = jax.jit(
        functools.partial(step.update, model=model, objective=objective, optimizer=optimizer, progress=0.0)
    )
    one = batch()
    new, _ = update(state, one, jnp.bool_(True))
    mean = one["inputs"].mean()
    np.testing.assert_allclose(new["buffers"]["seen"], [[0.5 * mean], [0.5 * (mean + 1)]], rtol=1e-6)
    np.testing.assert_array_equal(new["buffers"]["fixed"], np.ones(3))
    dropped, _ = update(state, one, jnp.bool_(False))
    np.testing.assert_array_equal(dropped["buffers"]["seen"], np.zeros((2, 1)))


@dataclasses.dataclass(frozen=True)
class Sooner(axes.ByProgress):
    def __call__(self, value, statistic, progress):
        return value + progress * (statistic - value)


class WatchedByProgress(Watched):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.seen = axes.buffer(jnp.zeros((2, 1)), ("layers", "experts"), Sooner())


def test_rules_that_ask_are_told_how_far_the_run_is():
    step, optimizer = Step(), optax.sgd(0.1)
    model, state = begin(WatchedByProgress, step, optimizer)
    arguments = {"model": model, "objective": objective, "optimizer": optimizer, "progress": 0.25}
    one = batch()
    new, _ = step.update(state, one, jnp.bool_(True), **arguments)
    mean = one["inputs"].mean()
    np.testing.assert_allclose(new["buffers"]["seen"], 0.25 * np.asarray([[mean], [mean + 1]]), rtol=1e-6)


class Mixed(Bigram):
    """Its table may be rounded, its output matrix not."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.out = axes.param(rngs, (8, 11), ("embed", "vocab"), exact=True)

    def __call__(self, tokens_BT, ctx: Context):
        assert self.table[...].dtype == jnp.bfloat16 and self.out[...].dtype == jnp.float32
        return super().__call__(tokens_BT, ctx)


def test_exact_parameters_stay_float32_in_low_precision():
    step, optimizer = Step(compute_dtype="bfloat16"), optax.sgd(0.1)
    model, state = begin(Mixed, step, optimizer)
    new, metrics = step.update(
        state, batch(), jnp.bool_(True), model=model, objective=objective, optimizer=optimizer, progress=0.0
    )
    assert new["params"]["table"].dtype == jnp.float32 and np.isfinite(metrics["loss"])
