import jax
import numpy as np
import optax
import pytest

from maxlike.optimizers import groups
from maxlike.optimizers.adamw import AdamW
from maxlike.schedules import Clock, Constant, Linear

CLOCK = Clock(steps=10, tokens_per_step=10)


def test_agrees_with_torch(axes, tensors, run):
    torch = pytest.importorskip("torch")
    params, gradients = tensors(0), [tensors(seed) for seed in range(1, 6)]
    kwargs = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.3}
    ours, _ = run(AdamW(schedule=Constant(lr=0.02), **kwargs)(axes, CLOCK), params, gradients)
    for name, decay in (("up", 0.3), ("norm", 0.0)):
        p = torch.nn.Parameter(torch.tensor(params["stack"][0][name]))
        adamw = torch.optim.AdamW([p], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
        for tree in gradients:
            p.grad = torch.tensor(tree["stack"][0][name])
            adamw.step()
        np.testing.assert_allclose(ours["stack"][0][name], p.detach().numpy(), atol=1e-6)


def test_agrees_with_optax_under_a_schedule(axes, tensors, run):
    params, gradients = tensors(0), [tensors(seed) for seed in range(1, 4)]
    schedule = Linear(lr=0.1, warmup=2)
    decays = {"matrix": True, "embedding": False, "vector": False}
    mask = jax.tree.map(lambda kind: decays[kind], groups.kinds(axes))
    theirs = optax.adamw(schedule(CLOCK), b1=0.9, b2=0.95, weight_decay=0.2, mask=mask)
    ours = AdamW(schedule=schedule, weight_decay=0.2, decay_embeddings=False)(axes, CLOCK)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        run(ours, params, gradients)[0],
        run(theirs, params, gradients)[0],
    )


def test_embedding_lr_ratio_scales_step_and_decay(axes, tensors, run):
    params, gradients = tensors(0), [tensors(1)]
    one, _ = run(AdamW(schedule=Constant(lr=0.1))(axes, CLOCK), params, gradients)
    third, _ = run(AdamW(schedule=Constant(lr=0.1), embedding_lr_ratio=1 / 3)(axes, CLOCK), params, gradients)
    moved = (one["embed"]["table"] - params["embed"]["table"]) / 3
    np.testing.assert_allclose(third["embed"]["table"] - params["embed"]["table"], moved, atol=1e-6)
    np.testing.assert_array_equal(third["project"], one["project"])
