"""Depth upscaling: a deeper model begins with copies of a trained one's layers."""

import json
import pathlib
from collections.abc import Callable
from typing import Literal, Self

import jax

from maxlike import checkpoint_tree
from maxlike.errors import UserError
from maxlike.passport import Stamp
from maxlike.warm_start import pointed, with_buffers, with_parameters
from maxlike.weight_map import Origin, Pick, Weights, within


class Deepen:
    """Begin with the layers of a shallower run, some of them twice (Yi, arXiv 2403.04652, section on depth upscaling;
    SOLAR, arXiv 2312.15166). Bound in `Experiment.warm_start` of an experiment with the larger Stack.depth.

    A layer is one period of Stack.pattern of the repeated part; prefix and suffix blocks and all else are taken by
    their own names. Copies are exact, nothing is scaled; the optimizer and the schedule begin anew: use a low constant
    learning rate, a warm-up to a high one would undo the beginning.

    source: a run directory, its `checkpoints`, or one checkpoint in it; the newest intact one is taken.
    window: (a, b), layers a to b - 1 of the source are put a second time directly behind b - 1, as a block: 0 .. b - 1,
        a .. b - 1, b .. end. Yi's 9B is (12, 28) of 32 layers, SOLAR's (8, 24). A number n chooses the n layers in a
        row that change the residual stream least, by the cosines that `--job measure` left in the source's run.
    layers: instead of a window, the source's layer for each layer here, in any order.
    skip: layers at each end that a window leaves alone, >= 0: those change the residual stream most.
    stack: path of the stack, where the network has several. tree: "params", or "ema" for averaged weights.
    Raises UserError for a window outside [skip, L - skip] or of a pattern of several blocks, which may differ, so that
    `layers` must say it; for a depth other than the layers give; for layers the source does not have; with a table
    where other parameters differ.
    """

    def __init__(
        self,
        *,
        source: str,
        window: tuple[int, int] | int | None = None,
        layers: tuple[int, ...] | None = None,
        skip: int = 2,
        stack: str = "stack",
        tree: Literal["params", "ema"] = "params",
    ):
        if (window is None) == (layers is None):
            raise UserError(f"Deepen takes one of window={window} and layers={layers}: give exactly one")
        if skip < 0:
            raise UserError(f"Deepen.skip={skip} is no number of layers: use 0 or more")
        self.source, self.tree = pathlib.Path(source), tree
        self.window = window if window is None or isinstance(window, int) else tuple(window)
        self.layers = None if layers is None else tuple(layers)
        self.skip, self.stack = skip, stack

    def from_run(self, source: pathlib.Path | str) -> Self:
        """The same warm start from another run, which may not be there yet."""
        return pointed(self, source)

    def __call__(self, state: dict, abstract_state: dict, say: Callable[[str], None]) -> tuple[dict, list[Stamp]]:
        """`state` with the deepened parameters, in the average too, the buffers like them, and their passport."""
        weights = Weights.open(self.source, self.tree, say)
        here = checkpoint_tree.flatten(abstract_state["params"])
        order = self._order(weights, here)

        def origin(path: str) -> Origin:
            return Origin(path, Pick(order) if self._repeated(path) else None)

        origins = {path: origin(path) for path in here}
        table = weights.difference(origins, here)
        if table:
            raise UserError(
                f"the parameters of {weights.directory} do not deepen to this model: all but Stack.depth must be the "
                f"same\n{table}"
            )
        leaves = list(weights.read(origins, here).values())
        params = jax.tree.unflatten(jax.tree.structure(abstract_state["params"]), leaves)
        say(f"parameters taken from {weights.directory}, its layers in the order {list(order)}")
        state = with_buffers(state, abstract_state, weights, origin, say)
        return with_parameters(state, params), weights.passport("Deepen", {"layers": list(order)})

    def _repeated(self, path: str) -> bool:
        return within(path, f"{self.stack}/periods")

    def _order(self, weights: Weights, here: dict[str, jax.ShapeDtypeStruct]) -> tuple[int, ...]:
        """The source's layer for each layer here."""
        found = [path for path in weights.leaves if self._repeated(path)]
        wanted = [path for path in here if self._repeated(path)]
        if not found or not wanted:
            where = weights.directory if wanted else "this model"
            raise UserError(
                f"Deepen.stack={self.stack!r} is no path of a stack in {where}: give the PATH of parameters "
                "PATH/periods/..."
            )
        depth, depth_here = weights.leaves[found[0]].shape[0], here[wanted[0]].shape[0]
        window = self.window
        if isinstance(window, int):
            window = best_window(_cosines(weights, depth), window, self.skip)
        order = order_of(window, self.layers, depth, self.skip)
        if self.window is not None and any(not within(path, f"{self.stack}/periods/0") for path in found):
            raise UserError(
                f"Deepen.window={self.window}: the pattern of {weights.directory} has several blocks, which may "
                "differ; say in Deepen.layers which of its periods stand where"
            )
        if len(order) != depth_here:
            raise UserError(
                f"Deepen makes {len(order)} layers of the {depth} in {weights.directory} and Stack.depth asks for "
                f"{depth_here}: set it to {len(order)} times the length of the pattern, or change the layers"
            )
        return order


def _cosines(weights: Weights, depth: int) -> list[float]:
    """The cosine of each layer of a run, from its measured.json."""
    path = weights.directory.parent.parent / "measured.json"
    how = "run `--job measure` on the source first, or give Deepen.window as (a, b)"
    try:
        content = json.loads(path.read_text())
        step, cosines = content["step"], [float(x) for x in content["values"]["layer_cosine/each"]]
    except FileNotFoundError:
        raise UserError(f"there is no {path} to choose the layers by: {how}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no cosines of layers: {how}") from None
    if step != weights.record.step or len(cosines) != depth:
        raise UserError(
            f"{path} has {len(cosines)} layers at step {step}, and the stack to deepen {depth} at step "
            f"{weights.record.step}: {how}"
        )
    return cosines


def best_window(cosines: list[float], size: int, skip: int) -> tuple[int, int]:
    """(a, b) of the `size` layers in a row with the largest mean cosine, `skip` layers at each end left alone."""
    starts = range(skip, len(cosines) - skip - size + 1)
    if size < 1 or not starts:
        raise UserError(
            f"Deepen.window={size}: no {size} layers in a row are in [{skip}, {len(cosines) - skip}], the source "
            f"without Deepen.skip={skip} at each end: take fewer"
        )
    start = max(starts, key=lambda a: sum(cosines[a : a + size]))
    return start, start + size


def order_of(window: tuple[int, int] | None, layers: tuple[int, ...] | None, depth: int, skip: int) -> tuple[int, ...]:
    """The old layer at each place of the deepened stack, of a source with `depth` layers; see Deepen."""
    if window is None:
        if not layers or min(layers) < 0 or max(layers) >= depth:
            raise UserError(f"Deepen.layers={layers}: the source has the layers 0 to {depth - 1}")
        return layers
    start, stop = window
    if not skip <= start < stop <= depth - skip:
        raise UserError(
            f"Deepen.window={window} is not a part of [{skip}, {depth - skip}], the {depth} layers of the source "
            f"without Deepen.skip={skip} at each end: move it, or change skip"
        )
    return (*range(stop), *range(start, stop), *range(stop, depth))
