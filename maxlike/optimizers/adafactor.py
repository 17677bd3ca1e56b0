"""Adafactor."""

from collections.abc import Callable

import jax
import optax

from maxlike.errors import UserError
from maxlike.optimizers import groups
from maxlike.schedules import Clock


class Adafactor:
    """Second moments kept as one row and one column per matrix (arXiv 1804.04235), no first moment.

    The factors follow the logical axes: an attention kernel (embed, heads, head_dim) is factored as embed x
    heads*head_dim. schedule: learning rate, absolute unless parameter_scale, which multiplies it by the parameter's RMS
    (the paper's relative step size). decay_rate: exponent of the moments' growing memory, 1 - t^-decay_rate, in (0, 1].
    clip: largest RMS of an update, > 0. factor_from: a matrix is factored if both sides are at least this long, >= 1.
    weight_decay: >= 0, multiplied by the learning rate; norm gains and biases never decay, embeddings and the head if
    decay_embeddings.
    Raises UserError outside these ranges, and where a stack of matrices is longer than a side that would be factored
    (the factors would then mix layers): raise factor_from.
    """

    def __init__(
        self,
        *,
        schedule: Callable,
        decay_rate: float = 0.8,
        clip: float = 1.0,
        parameter_scale: bool = False,
        factor_from: int = 128,
        weight_decay: float = 0.0,
        decay_embeddings: bool = True,
    ):
        if not 0 < decay_rate <= 1:
            raise UserError(f"Adafactor.decay_rate={decay_rate} is outside (0, 1].")
        if not clip > 0:
            raise UserError(f"Adafactor.clip={clip} must be positive.")
        if factor_from < 1:
            raise UserError(f"Adafactor.factor_from={factor_from} must be at least 1.")
        self.schedule, self.parameter_scale, self.factor_from = schedule, parameter_scale, factor_from
        parts = [
            optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=factor_from),
            optax.clip_by_block_rms(clip),
        ]
        self.direction = optax.chain(*parts, *([optax.scale_by_param_block_rms()] if parameter_scale else []))
        self.rules = groups.rules(groups.nonnegative("Adafactor.weight_decay", weight_decay), decay_embeddings)

    def __call__(self, axes: dict, clock: Clock) -> optax.GradientTransformation:
        return optax.chain(self._viewed(axes), groups.descend(axes, self.rules, self.schedule(clock)))

    def describe(self, axes: dict) -> dict[str, str]:
        """path -> what happens to the parameter."""
        return groups.describe(axes, "adafactor", self.rules)

    def _viewed(self, axes: dict) -> optax.GradientTransformation:
        """The direction, computed on the matrix views of the parameters."""
        kinds = groups.kinds(axes)
        views = jax.tree.map(lambda kind, axes: None if kind == "vector" else groups.view(axes), kinds, axes)

        def of(tree):
            return jax.tree.map(
                lambda view, x: x if view is None else view.of(x), views, tree, is_leaf=lambda view: view is None
            )

        def init(params):
            viewed = of(params)
            for path, x in jax.tree_util.tree_flatten_with_path(viewed)[0]:
                self._check(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape)
            return self.direction.init(viewed)

        def update(updates, state, params):
            viewed, state = self.direction.update(of(updates), state, of(params))
            return jax.tree.map(lambda x, like: x.reshape(like.shape), viewed, updates), state

        return optax.GradientTransformation(init, update)

    def _check(self, path: str, shape: tuple[int, ...]) -> None:
        stack, sides = shape[:-2], shape[-2:]
        if stack and min(sides) >= self.factor_from and max(stack) > min(sides):
            raise UserError(
                f"Adafactor.factor_from={self.factor_from} would factor {path} over its stack of {max(stack)} matrices "
                f"of {sides[0]} x {sides[1]}: set it above {min(sides)}."
            )
