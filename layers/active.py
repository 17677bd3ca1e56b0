"""How many of a network's parameters one token uses."""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx


@runtime_checkable
class Sparse(Protocol):
    """A module of which a token uses a part, such as a mixture of experts."""

    def idle_parameters(self) -> float:
        """How many of the module's parameters a token does not use, on average."""
        ...


def active_parameters(network: nnx.Module) -> float:
    """Parameters less those that a token does not use; works on shapes too."""
    parts = jax.tree.leaves(network, is_leaf=lambda part: isinstance(part, Sparse | nnx.Variable))
    idle = sum(part.idle_parameters() for part in parts if isinstance(part, Sparse))
    params = [x for x in jax.tree.leaves(network, is_leaf=_is_variable) if isinstance(x, nnx.Param)]
    return sum(param.size for param in params) - idle


def _is_variable(part: Any) -> bool:
    return isinstance(part, nnx.Variable)
