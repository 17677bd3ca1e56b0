"""An optimizer's state in bfloat16 or in the host's memory: half the bytes, the same course."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike.bench.timed import random_batch
from maxlike.checkpoint import Checkpoints
from maxlike.errors import UserError
from maxlike.optimizers.moments import Moments, stochastic_bfloat16
from maxlike.program import Program
from tests import tiny

SHAPE = ("stack.Stack.scan = True", "stack.Stack.depth = 1")


def train(*bindings, overlays=(), steps=5):
    """(program, losses, last state) of a few steps on made-up tokens."""
    experiment = tiny.load(*SHAPE, *bindings, overlays=("mesh/fsdp", *overlays))
    program = Program.of(experiment, experiment.mesh.open())
    batch = random_batch(experiment, 2048)
    step, state, batch = program.lower_step(batch).compile(), program.init(), program.put(batch)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, np.bool_(True))
        losses.append(float(metrics["loss"]))
    return program, np.asarray(losses), state


def arrays(state):
    return [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.ndim]


@pytest.fixture(scope="module")
def plain():
    return train()


@pytest.mark.large
def test_bfloat16_moments_are_half_as_large_and_train_alike(plain):
    _, losses, state = train(overlays=("memory/bf16_moments",))
    assert {leaf.dtype for leaf in arrays(state)} == {jnp.dtype("bfloat16")}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))
    assert sum(leaf.nbytes for leaf in arrays(state)) * 2 == sum(leaf.nbytes for leaf in arrays(plain[2]))
    assert losses[0] == plain[1][0] and np.abs(losses - plain[1]).max() < 2e-3 and losses[-1] < losses[0] - 0.1
    assert any((a != b).any() for a, b in zip(arrays(state), arrays(plain[2])))


@pytest.mark.large
def test_moments_in_the_hosts_memory_change_nothing(plain, tmp_path):
    program, losses, state = train(overlays=("memory/offload_optimizer",))
    np.testing.assert_array_equal(losses, plain[1])
    for ours, theirs in zip(arrays(state), arrays(plain[2]), strict=True):
        assert ours.sharding.memory_kind == "pinned_host" and ours.sharding.spec == theirs.sharding.spec
        np.testing.assert_array_equal(ours, theirs)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["params"])} == {"device"}
    # A checkpoint of either is the other's.
    store = Checkpoints(every=1).open(tmp_path, say=print)
    store.save(5, state, {"next_step": 5}, {})
    store.close()
    for target in (program, plain[0]):
        store = Checkpoints(every=1).open(tmp_path, say=print)
        restored, _ = store.restore(target.state, lambda step: {})
        store.close()
        for ours, wanted, theirs in zip(arrays(restored), arrays(target.state), arrays(state), strict=True):
            assert ours.sharding == wanted.sharding
            np.testing.assert_array_equal(ours, theirs)


def test_stochastic_rounding_is_to_a_neighbour_and_exact_in_the_mean():
    x = jnp.asarray([1.0, 1.0 + 2**-9, -3.3e-5, 0.0, jnp.inf, -jnp.inf, jnp.nan])
    rounded = jax.jit(jax.vmap(lambda key: stochastic_bfloat16(x, key)))(jax.random.split(jax.random.key(0), 4096))
    rounded = np.asarray(rounded, np.float32)
    assert set(rounded[:, 0]) == {1.0} and set(rounded[:, 3]) == {0.0}
    assert set(rounded[:, 1]) == {1.0, 1 + 2**-7}
    # The mean of 4,096 draws is within five standard errors.
    np.testing.assert_allclose(rounded[:, 1].mean(), x[1], atol=5 * 2**-7 * np.sqrt(3 / 16 / 4096))
    assert abs(rounded[:, 2].mean() / x[2] - 1) < 5 * 2**-8 / np.sqrt(4096) and len(set(rounded[:, 2])) == 2
    np.testing.assert_array_equal(rounded[:, 4:], np.tile([np.inf, -np.inf, np.nan], (4096, 1)))


def test_a_slow_moment_stands_still_under_nearest_rounding_alone():
    def last(rounding):
        moments = Moments(dtype="bfloat16", rounding=rounding)

        def step(v, i):
            v = moments.unpack(v)
            return moments.pack(0.999 * v + 0.001 * 2.0, jax.random.fold_in(jax.random.key(0), i)), None

        return jax.jit(lambda: jax.lax.scan(step, jnp.ones(256, jnp.bfloat16), jnp.arange(700))[0])()

    assert (last("nearest") == 1.0).all()
    expected = 2 - 0.999**700
    assert abs(float(jnp.mean(last("stochastic").astype(jnp.float32))) - expected) < 0.02


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"dtype": "float16"}, "Moments.dtype='float16'"),
        ({"dtype": "bfloat16", "rounding": "up"}, "Moments.rounding='up'"),
        ({"rounding": "nearest"}, 'Moments.rounding="nearest" rounds nothing'),
        ({"memory": "disk"}, "Moments.memory='disk'"),
    ],
)
def test_refusals(knobs, message):
    with pytest.raises(UserError, match=message):
        Moments(**knobs)


def test_a_device_without_host_memory_is_refused(plain, monkeypatch):
    program = plain[0]
    device = next(iter(jax.tree.leaves(program.shardings["opt"])[0].device_set))
    monkeypatch.setattr(type(device), "addressable_memories", lambda self: [], raising=False)
    with pytest.raises(UserError, match=r'Moments\.memory="pinned_host": cpu has only'):
        Moments(memory="pinned_host").place(program.shardings["opt"], program.state["opt"])
