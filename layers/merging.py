"""Parameters that only training needs, multiplied into their neighbours afterwards: the same function, fewer matrices.

A part that has such parameters has the method `merged`, which gives the plain part that computes the same.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.parts import map_parts


@runtime_checkable
class Merges(Protocol):
    """A module that a plainer one computes as well."""

    def merged(self) -> nnx.Module:
        """That module; itself where there is nothing to merge. Its numbers may be traced."""
        ...


def merged(network: Any) -> Any:
    """A network with every part in it merged."""
    return map_parts(lambda part: part.merged(), network, Merges)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in the dtype of a: computed in float64 on the host and rounded once, or, while tracing, in float32."""
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return jnp.matmul(a, b, precision="highest")
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    return jnp.asarray(exact.astype(a.dtype))
