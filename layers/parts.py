"""The modules of a kind in a tree of modules."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Kind = type | tuple[type, ...]


def parts(network: Any, kind: Kind) -> list[Any]:
    """The modules of a kind in order, without those inside another of the kind."""
    return [
        part for part in jax.tree.leaves(network, is_leaf=lambda part: isinstance(part, kind)) if isinstance(part, kind)
    ]


def named_parts(network: Any, kind: Kind) -> dict[str, Any]:
    """{path: module} of `parts`; paths such as stack/periods/0/ffn."""
    found = jax.tree_util.tree_flatten_with_path(network, is_leaf=lambda part: isinstance(part, kind))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): part for path, part in found if isinstance(part, kind)
    }


def map_parts(function: Callable[[Any], Any], network: Any, kind: Kind) -> Any:
    """The network with the function of every module of `parts` in its place."""
    return jax.tree.map(
        lambda part: function(part) if isinstance(part, kind) else part,
        network,
        is_leaf=lambda part: isinstance(part, kind),
    )


def every_part(network: Any, kind: Kind = nnx.Module) -> list[Any]:
    """The modules of a kind in order, those inside another too."""
    found: list[Any] = []

    def visit(part: Any) -> bool:
        if isinstance(part, kind):
            found.append(part)
        return False  # no leaf: what is inside is visited as well

    jax.tree.leaves(network, is_leaf=visit)
    return found
