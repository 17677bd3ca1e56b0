"""What a decoding cache costs, from the network alone: nothing is allocated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from maxlike.experiment import Experiment
from maxlike.refusals import is_refusal


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one row: `a_token` for each token it holds at the experiment's length, plus `state`, which
    no further token enlarges (recurrent states, full windows). `refusal`: what a network without a cache says."""

    a_token: float = 0.0
    state: float = 0.0
    refusal: str | None = None


def cache_size(experiment: Experiment, dtype: Any = None) -> CacheSize:
    """Of one row of `Experiment.sequence_length` tokens; dtype None is the experiment's compute dtype."""
    dtype = jnp.dtype(experiment.step.compute_dtype if dtype is None else dtype)
    model, length = experiment.bare(), experiment.sequence_length

    def total(length: int) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, length, dtype)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    try:
        short, long = total(length), total(2 * length)
    except ValueError as refusal:
        if not is_refusal(refusal):
            raise
        return CacheSize(refusal=str(refusal))
    a_token = (long - short) / length
    return CacheSize(a_token, short - a_token * length)
