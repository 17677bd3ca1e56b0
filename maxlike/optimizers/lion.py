"""Lion."""

from collections.abc import Callable

import optax

from maxlike.optimizers import groups
from maxlike.schedules import Clock


class Lion:
    """The sign of an interpolated momentum (arXiv 2302.06675): one buffer, every update of size lr.

    Its learning rate is 3 to 10 times below AdamW's, its weight decay as much above. schedule: learning rate.
    b1: weight of the momentum in the update's sign; b2: decay of the momentum; both in [0, 1).
    weight_decay: >= 0, multiplied by the learning rate; norm gains and biases never decay, embeddings and the head if
    decay_embeddings. embedding_lr_ratio: rate of embeddings and head in units of the schedule's, >= 0.
    Raises UserError outside these ranges.
    """

    def __init__(
        self,
        *,
        schedule: Callable,
        b1: float = 0.9,
        b2: float = 0.99,
        weight_decay: float = 1.0,
        decay_embeddings: bool = True,
        embedding_lr_ratio: float = 1.0,
    ):
        self.schedule = schedule
        self.b1, self.b2 = groups.fraction("Lion.b1", b1), groups.fraction("Lion.b2", b2)
        self.rules = groups.rules(
            groups.nonnegative("Lion.weight_decay", weight_decay),
            decay_embeddings,
            groups.nonnegative("Lion.embedding_lr_ratio", embedding_lr_ratio),
        )

    def __call__(self, axes: dict, clock: Clock) -> optax.GradientTransformation:
        direction = optax.scale_by_lion(self.b1, self.b2)
        return optax.chain(direction, groups.descend(axes, self.rules, self.schedule(clock)))

    def describe(self, axes: dict) -> dict[str, str]:
        """path -> what happens to the parameter."""
        return groups.describe(axes, "lion", self.rules)
