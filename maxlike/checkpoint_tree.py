"""What a checkpoint holds, leaf by leaf: flat names, shapes and dtypes, and the table of how two of them differ.

A tree is named by its paths, `params/stack/0/mixer/q` or `optimizer/0/mu/...`, whatever containers (dicts, optax's
named tuples, lists) it is made of, so that a file on disk does not depend on them.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from maxlike.errors import UserError

PyTree = Any
SHOWN = 20  # rows of each kind in a table of differences; a wrong width differs in hundreds


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype of a leaf; a Python number has the dtype 'python int' or 'python float'.

    key_impl: for a typed PRNG key, the name of its implementation ('threefry2x32'); the dtype is then jax's 'key<fry>'.
    """

    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def flatten(tree: PyTree) -> dict[str, Any]:
    """{path: leaf} in the order of jax.tree.leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the state have the same path: do not use '/' or both 0 and '0' as keys")
    return flat


def nest(flat: dict[str, Any]) -> dict:
    """Nested dicts of {path: leaf}: the form on disk."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(path: str, leaf: Any) -> Leaf:
    """Shape and dtype of a concrete or abstract leaf; refuses what a checkpoint cannot hold exactly."""
    if isinstance(leaf, int | float) and not isinstance(leaf, bool):
        return Leaf((), f"python {type(leaf).__name__}")
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        raise TypeError(f"a checkpoint cannot hold {path}, a {type(leaf).__name__}: use an array, an int or a float")
    if 0 in leaf.shape:
        raise TypeError(f"a checkpoint cannot hold {path}, which has no elements (shape {leaf.shape}): leave it out")
    concrete_key = is_key(leaf) and isinstance(leaf, jax.Array)
    return Leaf(tuple(leaf.shape), str(leaf.dtype), str(jax.random.key_impl(leaf)) if concrete_key else None)


def to_stored(leaf: Any) -> Any:
    """The form of a leaf that Orbax writes: keys as their words, Python numbers as 64-bit arrays."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, int):
        return np.asarray(leaf, np.int64)
    if isinstance(leaf, float):
        return np.asarray(leaf, np.float64)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def from_stored(stored: Any, abstract: Any, saved: Leaf) -> Any:
    """The inverse of `to_stored`, in the kind of the abstract leaf."""
    if is_key(abstract):
        keys = jax.random.wrap_key_data(stored, impl=saved.key_impl)
        return keys if abstract.sharding is None else jax.device_put(keys, abstract.sharding)
    return type(abstract)(stored) if isinstance(abstract, int | float) else stored


def difference(saved: dict[str, Leaf], wanted: dict[str, Leaf]) -> str | None:
    """A table of the paths that are missing from, extra in, or changed against the checkpoint; None where all agree."""
    missing = [(path, "", str(leaf)) for path, leaf in wanted.items() if path not in saved]
    extra = [(path, str(leaf), "") for path, leaf in saved.items() if path not in wanted]
    changed = [
        (path, str(saved[path]), str(leaf))
        for path, leaf in wanted.items()
        if path in saved and (saved[path].shape, saved[path].dtype) != (leaf.shape, leaf.dtype)
    ]
    if not missing and not extra and not changed:
        return None
    rows = [("", "path", "in the checkpoint", "in this run")]
    for kind, found in (("missing", missing), ("extra", extra), ("changed", changed)):
        rows += [(kind, *row) for row in sorted(found)[:SHOWN]]
        if len(found) > SHOWN:
            rows.append((kind, f"... and {len(found) - SHOWN} more", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def check_fingerprints(step: int, saved: dict[str, Any], expected: dict[str, Any], allowed: set[str]) -> None:
    """Raises UserError where a fingerprint {name: JSON} differs from that of checkpoint `step` and may not."""
    for name, value in expected.items():
        if step == 0 and name not in saved:
            continue  # imported weights have seen no data of ours
        if name not in allowed and saved.get(name) != value:
            raise UserError(
                f"the {name} changed since checkpoint {step} was saved (then {saved.get(name, 'not recorded')}, "
                f"now {value}): bring back the old one, or go on regardless with "
                f"--set checkpoint.Checkpoints.allow_changed=\"('{name}',)\""
            )
