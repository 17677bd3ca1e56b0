"""An experiment on a mesh with stages: evaluation passes through the pipeline, and what it costs is said."""

import numpy as np

from layers import kernels
from maxlike.bench.timed import random_batch
from maxlike.program import Program
from tests import tiny


def evaluate(*bindings, overlays=()):
    experiment = tiny.load(
        "vocab = 64", "stack.Stack.depth = 6", "stack.Stack.scan = True", *bindings, overlays=overlays
    )
    program = Program.of(experiment, experiment.mesh.open())
    state, batch = program.init(), random_batch(experiment, 64)
    kernels.forget()
    loss = program._evaluate(state["params"], state["buffers"], program.put(batch))["loss"].value()
    return float(loss), [(implementation, why) for op, implementation, why in kernels.report() if op == "pipeline"]


def test_evaluation_passes_through_the_pipeline_and_says_its_bubble():
    alone, nothing = evaluate()
    shape = "sharding.Mesh.shape = {'stage': 2, 'data': 2}"
    loss, said = evaluate(shape, overlays=("mesh/pipeline_repeats",))
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert not nothing
    assert said == [("circular", "2 stages x 3 repeats, 4 micro-batches: 7.7 % of the time is bubble")]
