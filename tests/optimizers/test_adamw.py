import jax
import numpy as np
import optax
import pytest

from maxlike.optimizers import groups
from maxlike.optimizers.adamw import AdamW
from maxlike.schedules import Clock, Constant, Linear

CLOCK = Clock(steps=10, tokens_per_step=10)


def test_agrees_with_torch(few, tensors, run):
    torch = pytest.importorskip("torch")
    params, gradients = tensors(0, few), [tensors(seed, few) for seed in range(1, 6)]
    optimizer = AdamW(schedule=Constant(lr=0.02), b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3)
    ours, _ = run(optimizer(few, CLOCK), params, gradients)
    for name, decay in (("up", 0.3), ("norm", 0.0), ("table", 0.3)):
        p = torch.nn.Parameter(torch.tensor(params[name]))
        adamw = torch.optim.AdamW([p], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
        for tree in gradients:
            p.grad = torch.tensor(tree[name])
            adamw.step()
        np.testing.assert_allclose(ours[name], p.detach().numpy(), atol=1e-6)


def test_agrees_with_optax_under_a_schedule(few, tensors, run):
    params, gradients = tensors(0, few), [tensors(seed, few) for seed in range(1, 4)]
    schedule = Linear(lr=0.1, warmup=2)
    mask = jax.tree.map(lambda kind: kind == "matrix", groups.kinds(few))
    theirs = optax.adamw(schedule(CLOCK), b1=0.9, b2=0.95, weight_decay=0.2, mask=mask)
    ours = AdamW(schedule=schedule, weight_decay=0.2, decay_embeddings=False)(few, CLOCK)
    for got, expected in zip(*(jax.tree.leaves(run(o, params, gradients)[0]) for o in (ours, theirs))):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_knobs_of_the_embedding():
    axes = {"table": ("vocab", "embed"), "up": ("embed", "mlp"), "norm": ("norm",)}
    plain = AdamW(schedule=Constant(lr=0.1)).describe(axes)
    asked = AdamW(schedule=Constant(lr=0.1), decay_embeddings=False, embedding_lr_ratio=0.5).describe(axes)
    assert plain["table"] == "adamw embedding, decay 0.1, lr x 1"
    assert asked["table"] == "adamw embedding, decay 0, lr x 0.5"
    assert asked["up"] == plain["up"] == "adamw matrix, decay 0.1, lr x 1"
    assert asked["norm"] == plain["norm"] == "adamw vector, decay 0, lr x 1"
