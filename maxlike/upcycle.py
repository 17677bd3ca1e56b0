"""Upcycling: a model with more experts begins as copies of the experts of a trained one with fewer."""

import pathlib
from collections.abc import Callable
from typing import Any, Literal, Self

import jax

from maxlike import checkpoint_tree
from maxlike.errors import UserError
from maxlike.passport import Stamp
from maxlike.warm_start import pointed, with_buffers, with_parameters
from maxlike.weight_map import Origin, Repeat, Weights, origin_of


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
        return pointed(self, source)

    def __call__(self, state: dict, abstract_state: dict, say: Callable[[str], None]) -> tuple[dict, list[Stamp]]:
        """`state` with the seed's parameters, in the average too, and its buffers, and their passport; fresh ones stay
        as `state` has them."""
        weights = Weights.open(self.source, self.tree, say)
        here = checkpoint_tree.flatten(abstract_state["params"])
        taken = {path: leaf for path, leaf in here.items() if not self._is_fresh(path)}
        self._check_fresh(here)
        origins = {path: self._origin(path, leaf.shape, weights) for path, leaf in taken.items()}
        table = weights.difference(origins, taken)
        if table:
            raise UserError(
                f"the parameters of {weights.directory} do not upcycle to this model: experts must have one shape and "
                f"the seed one expert in each group; name in Upcycle.fresh what the seed does not have\n{table}"
            )
        copied = weights.read(origins, taken)
        grown = sum(isinstance(origin.change, Repeat) for origin in origins.values())
        say(f"{len(copied)} parameters taken from {weights.directory}, experts of {grown} repeated, the rest fresh")
        initial = checkpoint_tree.flatten(state["params"])
        leaves = [copied[path] if path in copied else initial[path] for path in here]
        params = jax.tree.unflatten(jax.tree.structure(state["params"]), leaves)
        done = {"mapping": self.mapping, "experts repeated in": grown, "fresh": list(self.fresh)}
        state = with_buffers(state, abstract_state, weights, self._buffer, say)
        return with_parameters(state, params), weights.passport("Upcycle", done)

    def _buffer(self, path: str) -> Origin | None:
        return None if self._is_fresh(path) else origin_of(path, self.mapping)

    def _origin(self, path: str, shape: tuple[int, ...], weights: Weights) -> Origin | None:
        origin = origin_of(path, self.mapping)
        if origin is None or origin.change is not None or origin.path not in weights.leaves:
            return origin
        grows = _grown_dimension(path, weights.leaves[origin.path].shape, shape) is not None
        return Origin(origin.path, Repeat(shape)) if grows else origin

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
