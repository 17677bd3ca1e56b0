import jax
import numpy as np
import pytest

import tests.tiny as tiny
from maxlike.program import Program


@pytest.fixture(scope="package")
def subject():
    """(experiment, program, state, batch) of a tiny language model whose parameters have been shaken, all but the final
    norm's gain: with it at 1 a tied head can be rotated too."""
    experiment = tiny.load()
    program = Program.of(experiment, experiment.mesh.open())
    state = program.init()
    random = np.random.default_rng(7)
    leaves, structure = jax.tree.flatten(jax.device_get(state["params"]))
    shaken = [x + 0.2 * x.std() + 0.1 * random.normal(size=x.shape) for x in leaves]
    params = jax.tree.unflatten(structure, shaken)
    params["norm"]["gain"] = np.ones_like(params["norm"]["gain"])
    params = jax.tree.map(lambda x, like: jax.device_put(np.float32(x), like.sharding), params, state["params"])
    state = state | {"params": params}
    return experiment, program, state, experiment.open_validation().batch(0)
