"""Upcycling: a model with more experts begins as copies of the experts of a trained one with fewer."""

import copy
import pathlib
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from maxlike import checkpoint_files as files
from maxlike import checkpoint_tree, warm_start
from maxlike.checkpoint_tree import Leaf
from maxlike.errors import UserError


class Upcycle:
    """Begin with the parameters of a run whose layers had one expert where this model has several (MoMa, arXiv
    2407.21770, section 2.6, after sparse upcycling, arXiv 2212.05055). Bound in `Experiment.warm_start`.

    Each expert starts as an exact copy of the only one there; everything else is taken by its own name; what the seed
    cannot have, routers, is freshly initialised. So a 1t1i seed, ModalityMoE.groups = (1, 1), grows to (4, 4), and a
    model gets auxiliary routers. The optimizer and the schedule begin anew. The data do too: give the run data that the
    seed has not seen, such as another Experiment.seed.

    source: a run directory, its `checkpoints`, or one checkpoint in it; the newest intact one is taken.
    fresh: names of parameters or subtrees, at any depth, that are not in the source.
    mapping: {path here: path there}, as in WarmStart; None takes every parameter by its own name.
    tree: "params", or "ema" for averaged weights.
    Raises UserError with a table where a parameter has no source, another shape (but for the experts) or is left
    behind, and for a fresh name that fits no parameter.
    """

    def __init__(
        self,
        *,
        source: str,
        fresh: tuple[str, ...] = ("router",),
        mapping: dict[str, str] | None = None,
        tree: Literal["params", "ema"] = "params",
    ):
        self.source, self.fresh, self.tree = pathlib.Path(source), tuple(fresh), tree
        self.mapping = {"": ""} if mapping is None else dict(mapping)

    def from_run(self, source: pathlib.Path | str) -> Self:
        """The same warm start from another run, which may not be there yet."""
        other = copy.copy(self)
        other.source = pathlib.Path(source)
        return other

    def __call__(self, state: dict, abstract_state: dict, say: Callable[[str], None]) -> dict:
        """`state` with the seed's parameters, in the average too; fresh ones stay as `state` has them."""
        directory = warm_start.checkpoint_in(self.source.resolve(), say)
        saved_tree = files.read_record(directory).tree
        prefix = f"{self.tree}/"
        there = {path.removeprefix(prefix): leaf for path, leaf in saved_tree.items() if path.startswith(prefix)}
        here = checkpoint_tree.flatten(abstract_state["params"])
        taken = {path: leaf for path, leaf in here.items() if not self._is_fresh(path)}
        self._check_fresh(here)
        origin = {path: warm_start.renamed(path, self.mapping) for path in taken}
        _refuse_differences(directory, there, taken, origin)
        wanted = {f"{prefix}{name}": _as_saved(path, taken[path], there[name].shape) for path, name in origin.items()}
        if len(wanted) != len(taken):
            raise UserError(f"Upcycle.mapping uses a parameter of {directory} twice: give each a source of its own")
        read = files.read_leaves(directory, wanted, saved_tree)
        copied = {path: _repeat(read[f"{prefix}{name}"], taken[path]) for path, name in origin.items()}
        grown = [path for path, name in origin.items() if there[name].shape != taken[path].shape]
        say(f"{len(copied)} parameters taken from {directory}, experts of {len(grown)} repeated, the rest fresh")
        initial = checkpoint_tree.flatten(state["params"])
        leaves = [copied[path] if path in copied else initial[path] for path in here]
        params = jax.tree.unflatten(jax.tree.structure(state["params"]), leaves)
        return state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})

    def _is_fresh(self, path: str) -> bool:
        return any(f"/{name}/" in f"/{path}/" for name in self.fresh)

    def _check_fresh(self, here: dict[str, Any]) -> None:
        for name in self.fresh:
            if not any(f"/{name}/" in f"/{path}/" for path in here):
                raise UserError(f"Upcycle.fresh names {name!r} and the model has no such parameter: leave it out")


def _grown_dimension(path: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
    """The dimension of the experts (`layers.experts.Experts`), if the shapes differ there alone and the saved is 1."""
    if "experts" not in path.split("/") or len(saved) != len(wanted) or len(saved) < 3:
        return None
    experts = len(saved) - 3
    differing = [d for d, (a, b) in enumerate(zip(saved, wanted)) if a != b]
    return experts if differing == [experts] and saved[experts] == 1 else None


def _refuse_differences(directory: pathlib.Path, there: dict[str, Leaf], taken: dict, origin: dict) -> None:
    described = {path: checkpoint_tree.describe(path, leaf) for path, leaf in taken.items()}
    saved = {path: there[name] for path, name in origin.items() if name in there}
    for path, leaf in saved.items():
        if _grown_dimension(path, leaf.shape, described[path].shape) is not None:
            saved[path] = Leaf(described[path].shape, leaf.dtype)
    left = {f"{name} (unused)": there[name] for name in set(there) - set(origin.values())}
    table = checkpoint_tree.difference(saved | left, described)
    if table:
        raise UserError(
            f"the parameters of {directory} do not upcycle to this model: experts must have one shape and the seed one "
            f"expert in each group; name in Upcycle.fresh what the seed does not have\n{table}"
        )


def _as_saved(path: str, leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The abstract leaf in the shape it has on disk; the dimension of one expert is not sharded."""
    grown = _grown_dimension(path, shape, leaf.shape)
    sharding = leaf.sharding
    if grown is not None and isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        spec[grown] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _repeat(saved: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if saved.shape == leaf.shape:
        return saved
    return jax.jit(lambda x: jnp.broadcast_to(x, leaf.shape), out_shardings=leaf.sharding)(saved)
