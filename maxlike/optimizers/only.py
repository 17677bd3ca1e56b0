"""Training of a part of the parameters, the rest frozen."""

from collections.abc import Callable

import jax
import optax

from layers.axes import PARAMETER_AXES
from maxlike.errors import UserError
from maxlike.optimizers import groups
from maxlike.schedules import Clock


class Only:
    """`optimizer` on the parameters that have one of the logical axes `axes`; all others keep their values: no weight
    decay, no optimizer state.

    optimizer: an optimizer such as AdamW. axes: names of layers/axes.py; "auxiliary" is the auxiliary routers' own.
    Raises UserError for an axis that is unknown, or that no parameter of the model has.
    """

    def __init__(self, *, optimizer: Callable, axes: tuple[str, ...] = ("auxiliary",)):
        unknown = [axis for axis in axes if axis not in PARAMETER_AXES]
        if unknown or not axes:
            raise UserError(f"Only.axes={axes} must name logical axes of layers/axes.py: {', '.join(PARAMETER_AXES)}.")
        self.optimizer, self.axes, self.schedule = optimizer, tuple(axes), optimizer.schedule

    def __call__(self, axes: dict, clock: Clock) -> optax.GradientTransformation:
        labels = self._labels(axes)
        trained = self.optimizer(groups.select(axes, labels, "trained"), clock)
        return groups.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)

    def describe(self, axes: dict) -> dict[str, str]:
        """path -> what happens to the parameter."""
        labels = self._labels(axes)
        frozen = {jax.tree_util.keystr(path, simple=True, separator="/"): "frozen" for path, _ in _flat(labels)}
        return frozen | self.optimizer.describe(groups.select(axes, labels, "trained"))

    def _labels(self, axes: dict) -> dict:
        for axis in self.axes:
            if not any(axis in names for _, names in _flat(axes)):
                raise UserError(f"Only.axes names {axis!r} and no parameter of the model has that axis.")
        return jax.tree.map(
            lambda names: "trained" if set(names) & set(self.axes) else "frozen",
            axes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )


def _flat(tree: dict) -> list[tuple]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
