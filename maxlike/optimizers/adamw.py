"""AdamW."""

from collections.abc import Callable

import optax

from maxlike.optimizers import groups
from maxlike.schedules import Clock


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), bias-corrected, as in torch.optim.AdamW.

    schedule: learning rate. b1, b2: decay of the two moments, in [0, 1). eps: added to the root of the second, >= 0.
    weight_decay: >= 0, multiplied by the learning rate; norm gains and biases never decay, embeddings and the head if
    decay_embeddings. embedding_lr_ratio: rate of embeddings and head in units of the schedule's, >= 0.
    Raises UserError outside these ranges.
    """

    def __init__(
        self,
        *,
        schedule: Callable,
        b1: float = 0.9,
        b2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_embeddings: bool = True,
        embedding_lr_ratio: float = 1.0,
    ):
        self.schedule = schedule
        self.b1, self.b2 = groups.fraction("AdamW.b1", b1), groups.fraction("AdamW.b2", b2)
        self.eps = groups.nonnegative("AdamW.eps", eps)
        self.rules = groups.rules(
            groups.nonnegative("AdamW.weight_decay", weight_decay),
            decay_embeddings,
            groups.nonnegative("AdamW.embedding_lr_ratio", embedding_lr_ratio),
        )

    def __call__(self, axes: dict, clock: Clock) -> optax.GradientTransformation:
        direction = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return optax.chain(direction, groups.descend(axes, self.rules, self.schedule(clock)))

    def describe(self, axes: dict) -> dict[str, str]:
        """path -> what happens to the parameter."""
        return groups.describe(axes, "adamw", self.rules)
