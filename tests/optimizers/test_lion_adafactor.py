import jax
import numpy as np
import optax
import pytest

from maxlike.errors import UserError
from maxlike.optimizers.adafactor import Adafactor
from maxlike.optimizers.lion import Lion
from maxlike.schedules import Clock, Constant

CLOCK = Clock(steps=10, tokens_per_step=10)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_lion_agrees_with_optax(few, tensors, run):
    params, gradients = tensors(0, few), [tensors(seed, few) for seed in range(1, 4)]
    ours = Lion(schedule=Constant(lr=0.1), weight_decay=0.0)(few, CLOCK)
    close(run(ours, params, gradients)[0], run(optax.lion(0.1, weight_decay=0.0), params, gradients)[0])


def test_adafactor_agrees_with_optax_where_no_view_is_needed(run):
    rng = np.random.default_rng(0)
    params, *gradients = [
        {"w": rng.normal(size=(8, 12)).astype(np.float32), "b": rng.normal(size=12).astype(np.float32)}
        for _ in range(4)
    ]
    axes = {"w": ("embed", "mlp"), "b": ("mlp",)}
    ours = Adafactor(schedule=Constant(lr=0.1), parameter_scale=True, factor_from=4)(axes, CLOCK)
    theirs = optax.adafactor(0.1, min_dim_size_to_factor=4)
    close(run(ours, params, gradients)[0], run(theirs, params, gradients)[0])


def test_adafactor_factors_an_attention_kernel_as_the_matrix_it_is(run):
    rng = np.random.default_rng(0)
    params, *gradients = [{"q": rng.normal(size=(2, 8, 4, 3)).astype(np.float32)} for _ in range(3)]
    optimizer = Adafactor(schedule=Constant(lr=0.1), factor_from=4)
    kernel, state = run(optimizer({"q": ("layers", "embed", "heads", "head_dim")}, CLOCK), params, gradients)
    flat = [{"q": tree["q"].reshape(2, 8, 12)} for tree in (params, *gradients)]
    matrix, _ = run(optimizer({"q": ("layers", "embed", "mlp")}, CLOCK), flat[0], flat[1:])
    np.testing.assert_allclose(kernel["q"].reshape(2, 8, 12), matrix["q"], atol=1e-6)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == [1, 1, 1, 16, 24]  # two counts, an unused full moment, a row and a column per layer


def test_adafactor_refuses_to_factor_over_the_layers():
    optimizer = Adafactor(schedule=Constant(lr=0.1), factor_from=4)({"w": ("layers", "embed", "mlp")}, CLOCK)
    with pytest.raises(UserError, match=r"Adafactor\.factor_from.*stack of 9"):
        optimizer.init({"w": np.zeros((9, 8, 12), np.float32)})
