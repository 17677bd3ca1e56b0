"""Precision and memory overlays on a whole training step: each builds, meshes agree, the course stays bfloat16's."""

import jax
import numpy as np
import pytest

from maxlike import catalog
from maxlike.bench.timed import random_batch
from maxlike.errors import UserError
from maxlike.program import Program
from tests import tiny

EMULATED = ("low_precision.Float8.emulate = True", "low_precision.Float8.smallest = 16")
SHAPE = (
    "stack.Stack.scan = True",
    "stack.Stack.depth = 1",
    "step.Step.micro_batches = 2",
    "experiment.Experiment.batch_size = 16",
)


def train(*bindings, overlays=(), steps=5):
    """(losses, last state) of a few steps on made-up tokens."""
    experiment = tiny.load(*SHAPE, *bindings, overlays=overlays)
    program = Program.of(experiment, experiment.mesh.open())
    batch = random_batch(experiment, 2048)
    step, state, batch = program.lower_step(batch).compile(), program.init(), program.put(batch)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch, np.bool_(True))
        losses.append(float(metrics["loss"]))
    return np.asarray(losses), jax.device_get(state)


@pytest.fixture(scope="module")
def plain():
    return train()[0]


@pytest.mark.large
def test_delayed_scales_are_the_same_on_a_mesh_and_train_as_well(plain):
    eight = (*EMULATED, "step.Step.compute_dtype = 'float32'")
    one, state = train(*eight, overlays=("precision/fp8_delayed",))
    many, spread = train(*eight, overlays=("precision/fp8_delayed", "mesh/fsdp_tp"))
    # Sums in another order fall on other sides of a rounding boundary now and then.
    np.testing.assert_allclose(many, one, rtol=2e-3)
    assert (one != plain).any() and one[-1] < one[0] - 0.1
    np.testing.assert_allclose(one, plain, rtol=0.01)
    for ours, theirs in zip(jax.tree.leaves(spread["buffers"]), jax.tree.leaves(state["buffers"]), strict=True):
        assert (ours[..., :5] > 0).all() and (ours[..., 5:] < 0).all()  # five steps were seen
        # Of the first step, before Adam has divided small gradients by small moments.
        np.testing.assert_allclose(ours[..., 4], theirs[..., 4], rtol=0.01)


def test_gradients_accumulate_in_bfloat16(plain):
    rounded, _ = train("step.Step.accumulate_dtype = 'bfloat16'")
    assert (rounded != plain).any()
    np.testing.assert_allclose(rounded, plain, rtol=1e-3)
    with pytest.raises(UserError, match=r"Step.accumulate_dtype='bfloat16' accumulates nothing"):
        tiny.load("step.Step.accumulate_dtype = 'bfloat16'")


@pytest.mark.parametrize("name", [n for n in catalog.names("overlay") if n.startswith(("precision/", "memory/"))])
def test_every_overlay_loads(name):
    experiment = tiny.load(overlays=(name,))
    assert experiment.step.compute_dtype == ("bfloat16" if name.startswith("precision/") else "float32")
    if name.startswith("precision/") and name != "precision/bf16":
        program = Program.of(experiment, experiment.mesh.open())
        abstract = jax.eval_shape(lambda: program.model.merge(program.state["params"], program.state["buffers"]))
        assert abstract.stack.periods[0].ffn.up.product.why.startswith("16 x 32 is below")
