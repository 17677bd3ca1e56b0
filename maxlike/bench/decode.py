"""One decoding step at batch 1 against the time it takes to read the weights that it needs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.active import active_parameters
from layers.stack import unroll
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word
from maxlike.decode.cache_size import cache_size
from maxlike.experiment import Experiment


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`steps` greedy steps in one program, from the middle of a row of `Experiment.sequence_length`, random weights.

    The reads: bytes of the parameters that one token uses (of experts only the chosen, of an untied embedding nothing)
    over the best rate at which this device ever went through all of them (row sums), tried in turn with the steps: a
    busy moment can only make the ratio worse.
    """
    model = experiment.abstract_model()
    dtype, length = jnp.dtype(experiment.step.compute_dtype), experiment.sequence_length
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), dtype), model.params
    )
    buffers = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.buffers)

    @jax.jit
    def decode(params, buffers):
        network = unroll(nnx.merge(model.graph, params, buffers))
        cache = network.init_cache(1, length, dtype)
        cache["length_B"] = cache["length_B"] + length // 2

        def advance(state):
            n, token_B1, cache = state
            hidden_B1D, cache = network.extend(token_B1, cache)
            return n + 1, jnp.argmax(network.logits(hidden_B1D), -1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda state: state[0] < steps, advance, (0, jnp.zeros((1, 1), jnp.int32), cache))[1]

    @jax.jit
    def read(params):
        # A product with ones: the plain sum is five times slower under one of the flags that the launcher sets.
        return jax.tree.map(
            lambda leaf: jnp.reshape(leaf, (-1, leaf.shape[-1])) @ jnp.ones(leaf.shape[-1], dtype), params
        )

    step_seconds, read_seconds = [], []
    jax.block_until_ready((decode(params, buffers), read(params)))
    for _ in range(repeats):
        step_seconds.append(_seconds(decode, params, buffers) / steps)
        read_seconds += [_seconds(read, params) for _ in range(3)]
    network = experiment.bare()
    stored = sum(leaf.size for leaf in jax.tree.leaves(params))
    looked_up = 0 if network.head.tied else network.embed.table.size
    needed = (active_parameters(network) - looked_up) / stored
    ratios = [step / (min(read_seconds) * needed) for step in step_seconds]
    cache = cache_size(experiment)
    quantities = [
        Quantity("decoding step over the reads of its weights", "", ratios, "<= 2.0"),
        Quantity("decoding step", "ms", [1000 * seconds for seconds in step_seconds]),
        Quantity("rate of reading all weights", "GB/s", [stored * dtype.itemsize / s / 1e9 for s in read_seconds]),
        Quantity("cache", "bytes a token", [cache.a_token]),
        Quantity("state", "bytes a row", [cache.state]),
    ]
    name = experiment.config.name if experiment.config else "experiment"
    details = {
        "experiment": name,
        "parameters": stored,
        "read_in_a_step": needed * stored,
        "dtype": dtype.name,
        "length": length,
    }
    return Result(f"decode_{name.replace('/', '_')}", device_word(), quantities, details)


def _seconds(function, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began
