"""Metrics as sums with weights, so that micro-batches, hosts and steps add up exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass
class Mean:
    """A weighted mean kept as its two float32 sums: value = total / weight, and 0 where the weight is 0."""

    total: jax.Array | float
    weight: jax.Array | float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self):
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1.0), 0.0)
