"""Warm start: the parameters of one run in the model of another, by an explicit mapping."""

import copy
import pathlib
from collections.abc import Callable, Collection
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from absl import logging

from maxlike import checkpoint_files as files
from maxlike import checkpoint_tree, manifest
from maxlike.errors import UserError

PyTree = Any


def load_parameters(
    source: pathlib.Path,
    abstract_params: PyTree,
    mapping: dict[str, str],
    *,
    tree: str = "params",
    ignore: Collection[str] = (),
    say: Callable[[str], None] = logging.warning,
) -> PyTree:
    """Warm start: the parameters of another run, with the shapes, dtypes and shardings of `abstract_params`.

    source: a run directory, its `checkpoints`, or one checkpoint in it; the newest intact one is taken.
    mapping: {path here: path there}; a path is a parameter or a whole subtree, '' the root, and the longest one that
        fits a parameter is used: {'': ''} takes all by their own names, {'stack': 'decoder/stack', ...} renames.
    tree: which tree of the saved state to read ('params', or 'ema' for averaged weights).
    ignore: paths there that are deliberately left behind.
    Raises UserError with a table where a parameter is not named, not there, of another shape or dtype, or left behind
    without being ignored.
    """
    directory = checkpoint_in(pathlib.Path(source).resolve(), say)
    saved_tree = files.read_record(directory).tree
    there = {path.removeprefix(f"{tree}/"): leaf for path, leaf in saved_tree.items() if path.startswith(f"{tree}/")}
    flat = checkpoint_tree.flatten(abstract_params)
    origin = {path: renamed(path, mapping) for path in flat}
    unused = {path for path in there if path not in origin.values() and not any(_within(path, name) for name in ignore)}
    saved = {path: there[name] for path, name in origin.items() if name in there} | {
        f"{path} (unused)": there[path] for path in unused
    }
    table = checkpoint_tree.difference(
        saved, {path: checkpoint_tree.describe(path, leaf) for path, leaf in flat.items()}
    )
    if table:
        raise UserError(
            f"the mapping does not turn the parameters of {directory} into this model's: name every parameter in it, "
            f"and in `ignore` what is to be left behind\n{table}"
        )
    wanted = {f"{tree}/{name}": flat[path] for path, name in origin.items()}
    if len(wanted) != len(flat):
        raise UserError(f"the mapping uses a parameter of {directory} twice: give each parameter a source of its own")
    leaves = files.read_leaves(directory, wanted, saved_tree)
    return jax.tree.unflatten(jax.tree.structure(abstract_params), list(leaves.values()))


class WarmStart:
    """Begin with the parameters of another run. Bound in `Experiment.warm_start`, used while a run has no checkpoint.

    source, mapping, tree, ignore: see `load_parameters`; the default mapping takes every parameter by its own name.
    """

    def __init__(
        self,
        *,
        source: str,
        mapping: dict[str, str] | None = None,
        tree: Literal["params", "ema"] = "params",
        ignore: tuple[str, ...] = (),
    ):
        self.source = pathlib.Path(source)
        self.mapping = {"": ""} if mapping is None else dict(mapping)
        self.tree = tree
        self.ignore = tuple(ignore)

    def from_run(self, source: pathlib.Path | str) -> Self:
        """The same warm start from another run, which may not be there yet."""
        other = copy.copy(self)
        other.source = pathlib.Path(source)
        return other

    def __call__(self, state: dict, abstract_state: dict, say: Callable[[str], None]) -> dict:
        """`state` with the other run's parameters, in the average too; the optimizer begins anew."""
        params = load_parameters(
            self.source, abstract_state["params"], self.mapping, tree=self.tree, ignore=self.ignore, say=say
        )
        say(f"parameters taken from {self.source}")
        return state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})


def _within(path: str, root: str) -> bool:
    return root == "" or path == root or path.startswith(f"{root}/")


def renamed(path: str, mapping: dict[str, str]) -> str | None:
    """The path there of a path here, or None where the mapping does not name it."""
    roots = [root for root in mapping if _within(path, root)]
    if not roots:
        return None
    root = max(roots, key=len)
    return "/".join(part for part in (mapping[root], path[len(root) :].lstrip("/")) if part)


def checkpoint_in(source: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path:
    """The newest intact checkpoint in a run directory or its `checkpoints`, or `source` itself if it is one."""
    files.quieten_orbax()
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    candidates = [folder / str(step) for step in reversed(files.steps(folder))]
    for candidate in candidates or [source]:
        damage = manifest.damage(candidate)
        if damage is None:
            return candidate
        say(f"checkpoint {candidate} is damaged: {damage}")
    raise UserError(
        f"there is no intact checkpoint in {source}: give a run directory, or a directory checkpoints/STEP of one"
    )
