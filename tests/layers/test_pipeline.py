"""A pipeline computes what the layers compute one after another, wherever its stages, micro-batches and repeats lie."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import axes
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.norm import RMSNorm
from layers.pipeline import Circular, bubble, deal_rounds
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.program import Program
from maxlike.sharding import Mesh
from tests import tiny
from tests.reference.pipeline import Counting, Mixing, micro_batches, sequential
from tests.reference.random import random_module

F = functools.partial
D, T = 8, 6
RULES = tiny.load().mesh.rules


BLOCK = F(Block, mixer=Mixing, ffn=Counting, norm=RMSNorm)


def inputs(B):
    rng = np.random.default_rng(0)
    segments_BT = np.sort(rng.integers(0, 3, (B, T)), 1).astype(np.int32)[:, ::-1]
    ctx = Context(jnp.tile(jnp.arange(T), (B, 1)), jnp.asarray(segments_BT), key=jax.random.key(3), train=True)
    return rng.standard_normal((B, T, D)).astype(np.float32), ctx


def results(run, params, x_BTD, ctx):
    """Result, reports and gradients (statistics of buffers among them) of `run(params, x_BTD, ctx)`."""

    def loss(params, x_BTD):
        y_BTD, aux = run(params, x_BTD, ctx)
        return jnp.sum(jnp.sin(y_BTD)) + jnp.sum(aux["loss"]), (y_BTD, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x_BTD)


def assert_close(got, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max())), got, expected
    )


def build(**knobs):
    return random_module(lambda rngs: Stack(D, rngs=rngs, scan=True, **knobs))[:2]


@pytest.mark.parametrize(
    ("shape", "B", "M", "R", "depth", "dtype"),
    [
        ({"stage": 4}, 8, 2, 1, 4, "bfloat16"),  # M < S
        ({"stage": 4, "data": 2}, 24, 6, 2, 8, "float32"),  # M no multiple of S
        ({"stage": 2, "fsdp": 2, "tensor": 2}, 8, 2, 3, 6, "float32"),  # M = S
    ],
)
def test_circular_is_the_stack_one_micro_batch_after_another(shape, B, M, R, depth, dtype):
    knobs = {"pattern": (BLOCK,), "depth": depth}
    graph, params = build(**knobs)
    piped = build(**knobs, pipeline=F(Circular, micro_batches=M, repeats=R))[0]
    x_BTD, ctx = inputs(B)
    rows = micro_batches(B, shape["stage"], M)

    def cast(tree):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    def alone(params, x_BTD, ctx):
        return sequential(lambda: nnx.merge(graph, cast(params)), cast(x_BTD), ctx, rows)

    def staged(params, x_BTD, ctx):
        return nnx.merge(piped, cast(params))(cast(x_BTD), ctx)

    expected = results(alone, params, x_BTD, ctx)
    counting = expected[1][0]["periods"][0]["ffn"]
    counting["count"] = counting["count"] / M  # a statistic is the mean over the micro-batches, not their sum
    with axes.place_with(Mesh(shape=shape, rules=RULES).open()):
        got = results(staged, params, x_BTD, ctx)
    if dtype == "bfloat16":  # rounding makes another count
        for gradients in (expected[1][0], got[1][0]):
            del gradients["periods"][0]["ffn"]["count"]
    assert_close(got, expected, 1e-5 if dtype == "float32" else 2e-2)
    np.testing.assert_array_equal(got[0][1][1]["ffn/layer"], np.arange(depth))


def test_decoding_on_a_mesh_with_stages_runs_stage_after_stage():
    graph, params = build(pattern=(F(Block, mixer=F(Attention, heads=2), ffn=None, norm=RMSNorm),), depth=2)
    stack = nnx.merge(graph, params)
    x_BTD, _ = inputs(4)

    @jax.jit
    def decode(stack, x_BTD):
        ctx = Context.of(x_BTD[..., 0], lengths_B=jnp.full(4, T))
        return stack.extend(x_BTD, stack.init_cache(4, T, jnp.float32), ctx)[0]

    expected = decode(stack, x_BTD)
    layout = Mesh(shape={"stage": 2, "data": 2}, rules=RULES).open()
    with axes.place_with(layout):
        staged = jax.device_put(stack, layout.sharding(("layers",), (2,), "parameters"))
        np.testing.assert_allclose(decode(staged, x_BTD), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pipeline": None}, r"Stack.pipeline=None on a mesh whose axes \('stage',\) are stages"),
        ({"pipeline": F(Circular, micro_batches=3)}, "Circular.micro_batches=3 does not divide the 8 rows"),
        ({"pipeline": F(Circular, micro_batches=2, repeats=2)}, "micro_batches=2 is less than the 4 stages"),
        ({"pipeline": F(Circular, micro_batches=4, repeats=3)}, "Stack.depth must be a multiple of 12 times"),
    ],
)
def test_counts_that_do_not_fit_are_refused(changes, sentence):
    graph, params = build(pattern=(BLOCK,), depth=8, **changes)
    x_BTD, ctx = inputs(8)
    with axes.place_with(Mesh(shape={"stage": 4}, rules=RULES).open()), pytest.raises(ValueError, match=sentence):
        jax.eval_shape(lambda params: nnx.merge(graph, params)(x_BTD, ctx), params)


def test_a_depth_that_the_stages_do_not_divide_names_the_knob():
    experiment = tiny.load("stack.Stack.depth = 3", overlays=("mesh/pipeline",))
    with pytest.raises(UserError, match=r"'layers' of size 3 does not divide over stage=2.*Stack\.depth"):
        Program.of(experiment, experiment.mesh.open())


@pytest.mark.parametrize("knobs", [{"micro_batches": 0}, {"micro_batches": 1, "repeats": 0}])
def test_a_pipeline_of_nothing_is_refused(knobs):
    with pytest.raises(ValueError, match=r"Circular\.\w+=0 must be at least 1"):
        Circular(**knobs)


@pytest.mark.parametrize(("stages", "repeats"), [*itertools.product(range(1, 9), range(1, 6))])
def test_layers_are_dealt_in_as_many_rounds_as_repeats(stages, repeats):
    rounds = deal_rounds(stages, repeats)
    assert sorted(v for sent in rounds for v in sent) == list(range(stages * repeats))
    for sent in rounds:
        assert [v // repeats for v in sent] == list(range(stages))  # each sends what it holds
        assert sorted(v % stages for v in sent) == list(range(stages))  # and gets what it works on


def circular_events(S, M, R):
    """Ticks in which each stage works: whatever is ready is done at once, the micro-batch that began first first."""
    done, busy, tick = {}, [0] * S, 0
    while len(done) < M * R * S:
        ready = []
        for stage in range(S):
            for r, m in itertools.product(range(R), range(M)):
                run = r * S + stage
                before = done.get((run - 1, m), tick) < tick if run else True
                if (run, m) not in done and before:
                    ready.append((stage, run, m))
                    break
        for stage, run, m in ready:
            done[run, m] = tick
            busy[stage] += 1
        tick += 1
    return tick, busy


def one_f_one_b_events(S, M):
    """The same of forward and backward passes, of which a stage does one of each in a tick; and the most inputs that a
    stage keeps."""
    forward, backward, tick, most = {}, {}, 0, 0
    while len(backward) < M * S:
        for stage in range(S):
            m = sum((stage, k) in forward for k in range(M))
            if m < M and (stage == 0 or forward.get((stage - 1, m), tick) < tick):
                in_flight = m - sum((stage, k) in backward for k in range(M))
                if in_flight < 2 * (S - stage) - 1:
                    forward[stage, m] = tick
        for stage in range(S):
            most = max(most, sum((stage, k) in forward and (stage, k) not in backward for k in range(M)))
            m = sum((stage, k) in backward for k in range(M))
            after = forward.get((stage, m)) == tick if stage == S - 1 else backward.get((stage + 1, m), tick) < tick
            if m < M and after:
                backward[stage, m] = tick
        tick += 1
    return len({*forward.values()}), len({*backward.values()}), most


@pytest.mark.parametrize(
    ("S", "M", "R"), [(2, 1, 1), (4, 4, 1), (4, 7, 1), (8, 32, 1), (8, 32, 2), (4, 6, 3), (1, 5, 1)]
)
def test_bubble_is_what_a_simulation_counts(S, M, R):
    ticks, busy = circular_events(S, M, R)
    assert [1 - work / ticks for work in busy] == pytest.approx([bubble("circular", S, M, R)] * S)
    if R == 1:
        forwards, backwards, kept = one_f_one_b_events(S, M)  # stages wait for each other: a tick costs one of either
        assert (1 - M / forwards, 1 - M / backwards) == pytest.approx((bubble("1f1b", S, M),) * 2)
        assert kept == min(M, 2 * S - 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("zero_bubble", 4, 4), "known: circular, 1f1b"),
        (("circular", 0, 4), "stages=0"),
        (("1f1b", 4, 4, 2), "repeats=2: the schedule '1f1b'"),
        (("circular", 4, 3, 2), "micro_batches=3 is less than the 4 stages"),
    ],
)
def test_a_schedule_that_cannot_run_has_no_bubble(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        bubble(*arguments)
