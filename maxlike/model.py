"""AbstractModel: a network without its numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.axes import Buffer, Keys


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """What jit, the sharding, the step and the checkpoint need of a network.

    graph: the static part. params, buffers: nested pure dicts of shapes. For each parameter `axes`, its logical axes,
    and `exact`, whether it stays float32 in any compute dtype; for each buffer its rule (see `layers.axes`).
    """

    graph: Any
    params: dict
    buffers: dict
    axes: dict
    exact: dict
    buffer_rules: dict

    @classmethod
    def of(cls, factory: Callable) -> "AbstractModel":
        """Of `factory(rngs=...)`, traced without computing a number."""
        graph, params, buffers = jax.eval_shape(lambda key: split(factory, key), jax.random.key(0))

        def told(state: Any, name: str) -> dict:
            return nnx.to_pure_dict(state, extract_fn=lambda variable: variable.get_metadata(name))

        return cls(
            graph=graph,
            params=nnx.to_pure_dict(params),
            buffers=nnx.to_pure_dict(buffers),
            axes=told(params, "axes"),
            exact=told(params, "exact"),
            buffer_rules=told(buffers, "rule"),
        )

    def cast(self, params: dict, dtype: jnp.dtype) -> dict:
        """Float32 parameters in `dtype`, but for the exact ones."""
        return jax.tree.map(
            lambda p, exact: p.astype(dtype) if p.dtype == jnp.float32 and not exact else p, params, self.exact
        )

    def merge(self, params: dict, buffers: dict) -> Any:
        """The network with these numbers, or shapes."""
        return nnx.merge(self.graph, params, buffers)


def split(factory: Callable, key: jax.Array) -> tuple[Any, Any, Any]:
    """(graph, params, buffers) of a freshly initialised network, the latter two as flax states."""
    return nnx.split(factory(rngs=Keys(key)), nnx.Param, Buffer)
