"""Warm start: the parameters of one run in the model of another, by an explicit mapping."""

import copy
import pathlib
from collections.abc import Callable, Collection
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from absl import logging

from maxlike import checkpoint_tree
from maxlike.errors import UserError
from maxlike.passport import Stamp
from maxlike.weight_map import Origin, Weights, origin_of

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
    mapping: {path here: path there}, with cuts where the shapes differ, see `maxlike.weight_map`.
    tree: which tree of the saved state to read ('params', or 'ema' for averaged weights).
    ignore: paths there that are deliberately left behind.
    Raises UserError with a table where a parameter is not named, not there, of another shape or dtype, or left behind
    without being ignored.
    """
    return _take(Weights.open(pathlib.Path(source), tree, say), abstract_params, mapping, ignore)


def _take(weights: Weights, abstract_params: PyTree, mapping: dict[str, str], ignore: Collection[str]) -> PyTree:
    here = checkpoint_tree.flatten(abstract_params)
    origins = {path: origin_of(path, mapping) for path in here}
    table = weights.difference(origins, here, ignore)
    if table:
        raise UserError(
            f"the mapping does not turn the parameters of {weights.directory} into this model's: name every parameter "
            f"in it, and in `ignore` what is to be left behind\n{table}"
        )
    return jax.tree.unflatten(jax.tree.structure(abstract_params), list(weights.read(origins, here).values()))


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
        return pointed(self, source)

    def __call__(self, state: dict, abstract_state: dict, say: Callable[[str], None]) -> tuple[dict, list[Stamp]]:
        """`state` with the other run's parameters, in the average too, and its buffers, and their passport; the
        optimizer begins anew."""
        weights = Weights.open(self.source, self.tree, say)
        params = _take(weights, abstract_state["params"], self.mapping, self.ignore)
        say(f"parameters taken from {weights.directory}")
        state = with_buffers(state, abstract_state, weights, lambda path: origin_of(path, self.mapping), say)
        return with_parameters(state, params), weights.passport("WarmStart", {"mapping": self.mapping})


def pointed(warm_start: Any, source: pathlib.Path | str) -> Any:
    """A copy of a warm start with another source."""
    other = copy.copy(warm_start)
    other.source = pathlib.Path(source)
    return other


def with_parameters(state: dict, params: PyTree) -> dict:
    """`state` with these parameters, in the average too where it has one."""
    return state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})


def with_buffers(
    state: dict,
    abstract_state: dict,
    weights: Weights,
    origin: Callable[[str], Origin | None],
    say: Callable[[str], None],
) -> dict:
    """`state` with the buffers of the run that the parameters come from: a router without the bias that it was trained
    with chooses other experts. origin: of the buffer at a path here. `say` names those that are not there, or of
    another shape, and begin anew."""
    if "buffers" not in state:
        return state
    here = checkpoint_tree.flatten(abstract_state["buffers"])
    taken = weights.buffers({path: origin(path) for path in here}, here)
    anew = [path for path in here if path not in taken]
    if anew:
        say(f"buffers that begin anew: {', '.join(anew)}")
    initial = checkpoint_tree.flatten(state["buffers"])
    leaves = [taken[path] if path in taken else initial[path] for path in here]
    return state | {"buffers": jax.tree.unflatten(jax.tree.structure(state["buffers"]), leaves)}
