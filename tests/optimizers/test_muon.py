"""Muon against ten lines of numpy, the algebra of Newton-Schulz, and itself on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers import axes as logical
from maxlike.optimizers.adamw import AdamW
from maxlike.optimizers.muon import COEFFICIENTS, Muon, newton_schulz, orthogonalize
from maxlike.schedules import Clock, Constant, Linear

CLOCK = Clock(steps=10, tokens_per_step=10)
ADAMW = AdamW(schedule=Constant(lr=0.03))


def muon(**knobs):
    return Muon(schedule=Constant(lr=0.02), others=ADAMW, ns_dtype="float32", **knobs)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="dtype")
def ortho(matrices, dtype="float32"):
    return orthogonalize(matrices, steps=5, dtype=jnp.dtype(dtype))


def iterate(u, steps=5):
    a, b, c = COEFFICIENTS
    x = u.astype(np.float64) / (np.linalg.norm(u) + 1e-8)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference(w, gradients, rate, scale, nesterov=True, decay=0.01):
    momentum = np.zeros(w.shape)
    w = w.astype(np.float64)
    for count, g in enumerate(gradients):
        momentum = 0.95 * momentum + g
        x = iterate(g + 0.95 * momentum if nesterov else momentum)
        w = w - rate(count) * (scale * x + decay * w)
    return w


def test_newton_schulz_maps_singular_values_by_its_polynomial():
    a, b, c = COEFFICIENTS
    x = normal(0, 6, 9)
    x /= np.linalg.norm(x)
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x), 5), (u * s) @ vt, atol=1e-4)


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0.66, 1.15), ("bfloat16", 0.6, 1.25)])
def test_singular_values_of_the_result_lie_in_their_range(dtype, low, high):
    x = jnp.asarray(normal(1, 3, 24, 64))
    (result,) = ortho([x], dtype)
    assert result.dtype == jnp.float32
    values = np.linalg.svd(result, compute_uv=False)
    assert low < values.min() and values.max() < high


def test_transposes_stacks_and_neighbours_do_not_matter():
    x, y = jnp.asarray(normal(2, 4, 6, 10)), jnp.asarray(normal(3, 10, 6))
    together = ortho([x, y, x.mT])
    np.testing.assert_allclose(together[2], together[0].mT, atol=1e-5)
    for got, expected in zip([*together[0], together[1]], [*map(iterate, np.asarray(x)), iterate(np.asarray(y).T).T]):
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_and_rank_deficient_matrices_stay_finite(dtype):
    zero, thin = jnp.zeros((5, 7)), jnp.asarray(np.outer(normal(4, 5), normal(5, 7)) * 1e-12)
    result = ortho([zero, thin], dtype)
    assert not np.any(result[0])
    assert np.all(np.isfinite(result[1]))


def test_six_steps_agree_with_numpy_and_everything_else_with_adamw(axes, tensors, run):
    names = ("q", "out", "expert", "router", "norm")
    axes = {name: axes["stack"][0][name] for name in names} | {"embed": axes["embed"]}
    params, gradients = tensors(0, axes), [tensors(seed, axes) for seed in range(1, 7)]
    schedule = Linear(lr=0.02, warmup=2)
    optimizer = Muon(schedule=schedule, others=ADAMW, ns_dtype="float32")
    ours, state = run(optimizer(axes, CLOCK), params, gradients)
    rate = schedule(CLOCK)

    def expect(name, rows, columns, scale):
        leaves = [tree[name]["kernel"] if name == "q" else tree[name] for tree in (ours, params, *gradients)]
        got, w, *g = [np.asarray(leaf).reshape(-1, rows, columns) for leaf in leaves]
        for i in range(len(got)):
            np.testing.assert_allclose(got[i], reference(w[i], [m[i] for m in g], rate, scale), atol=1e-5)

    expect("q", 8, 6, 0.2 * 8**0.5)  # embed x heads*head_dim
    expect("out", 6, 8, 0.2 * 8**0.5)  # heads*head_dim x embed
    expect("expert", 12, 8, 0.2 * 12**0.5)
    expect("router", 8, 4, 0.2 * 8**0.5)
    assert state["matrices"][0]["momentum"]["expert"].shape == params["expert"].shape

    def rest(tree):
        return {"embed": tree["embed"], "norm": tree["norm"], "q": {"bias": tree["q"]["bias"]}}

    others, _ = run(ADAMW(rest(axes), CLOCK), rest(params), [rest(tree) for tree in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), rest(ours), others)


@pytest.mark.parametrize(("scale", "up", "down"), [("spectral", 2, 1), ("none", 1, 1)])
def test_scales_without_nesterov(run, scale, up, down):
    params = {"up": normal(0, 4, 16), "down": normal(1, 16, 4)}
    gradients = [{"up": normal(seed, 4, 16), "down": normal(seed, 4, 16).T} for seed in (2, 3)]
    transformation = muon(scale=scale, nesterov=False)({"up": ("embed", "mlp"), "down": ("mlp", "embed")}, CLOCK)
    after, _ = run(transformation, params, gradients)
    directions = [g["up"] for g in gradients]
    expected = reference(params["up"], directions, lambda count: 0.02, up, nesterov=False)
    np.testing.assert_allclose(after["up"], expected, atol=1e-5)
    expected = reference(params["down"].T, directions, lambda count: 0.02, down, nesterov=False)
    np.testing.assert_allclose(after["down"], expected.T, atol=1e-5)


def test_zero_gradient_moves_nothing_but_by_decay(run):
    params = {"w": normal(0, 6, 9)}
    after, _ = run(
        muon(weight_decay=0.5)({"w": ("embed", "mlp")}, CLOCK), params, [{"w": np.zeros((6, 9), np.float32)}]
    )
    np.testing.assert_allclose(after["w"], params["w"] * (1 - 0.02 * 0.5), rtol=1e-6)


def test_agrees_with_optax_on_the_first_step_and_on_newton_schulz(run):
    """optax's Muon has another momentum (a corrected average); at the first step its direction is the same."""
    params, gradients = {"w": normal(0, 6, 9)}, [{"w": normal(1, 6, 9)}]
    theirs = optax.contrib.muon(0.02, consistent_rms=0.2, weight_decay=0.01, ns_coeffs=COEFFICIENTS)
    ours, _ = run(muon()({"w": ("embed", "mlp")}, CLOCK), params, gradients)
    np.testing.assert_allclose(ours["w"], run(theirs, params, gradients)[0]["w"], atol=1e-5)


@pytest.mark.parametrize("shards", [1, 8])
def test_sharded_equals_one_device(axes, tensors, shards):
    """Parameters over eight devices; with shards 8 the stacks of matrices are padded and split whole."""
    axes = {name: axes["stack"][0][name] for name in ("up", "out")}
    params, gradients = tensors(0, axes), tensors(1, axes)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}
    asked = []

    class Placed:
        def __init__(self):
            self.mesh = mesh

        def mesh_axes(self, axis):
            return ("fsdp", "tensor")

        def activation(self, names, shape):
            asked.append((names, shape))
            return PartitionSpec(("fsdp", "tensor"), None, None)

    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*(rules.get(name) for name in names))),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    transformation = muon(stack_shards=shards)(axes, CLOCK)
    state = transformation.init(params)
    expected, _ = jax.jit(transformation.update)(gradients, state, params)
    place = jax.device_put(params, shardings), jax.device_put(gradients, shardings)
    with logical.place_with(Placed()):
        # a new function: jit would otherwise answer from its cache, without the mesh
        update = jax.jit(lambda g, s, p: transformation.update(g, s, p), out_shardings=(shardings, None))
        got, _ = update(place[1], state, place[0])
    assert bool(asked) == (shards > 1)
    assert all(names[0] == "matrices" and shape[0] % 8 == 0 for names, shape in asked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
