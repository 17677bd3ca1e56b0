"""How many of a network's parameters one token uses."""

from typing import Protocol, runtime_checkable

from flax import nnx

from layers.parts import parts


@runtime_checkable
class Sparse(Protocol):
    """A module of which a token uses a part, such as a mixture of experts."""

    def idle_parameters(self) -> float:
        """How many of the module's parameters a token does not use, on average."""
        ...


def active_parameters(network: nnx.Module) -> float:
    """Parameters less those that a token does not use; works on shapes too."""
    idle = sum(part.idle_parameters() for part in parts(network, Sparse))
    return sum(param.size for param in parts(network, nnx.Param)) - idle
