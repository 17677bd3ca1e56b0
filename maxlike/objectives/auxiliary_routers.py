"""Training of auxiliary routers, after everything else."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.next_token import NextToken


class AuxiliaryRouters:
    """Binary cross-entropy of auxiliary routers against the choices of the routers that they stand in for, mean over
    tokens, experts and layers (MoMa, arXiv 2407.21770, section 2.5).

    The choices are those of training, made without noise. Only auxiliary routers get a gradient; the optimizer `Only`
    keeps weight decay off all else, and `Upcycle` begins with the parameters of a run that had none of them.

    Reads of the batch [B, T]: inputs (int32), segment_ids, positions (int32); an evaluation also what
    `next_token` reads.

    next_token: objective that an evaluation reports too; None for NextToken().

    Metrics: loss (nats a decision), what the layers report (auxiliary_accuracy, auxiliary_recall among it), and in an
    evaluation next_token/...: that objective's metrics, routed as ModalityMoE.evaluation and MixtureOfDepths.evaluation
    say.
    Raises UserError for a model without auxiliary routers.
    """

    def __init__(self, *, next_token: Callable | None = None):
        self.next_token = NextToken() if next_token is None else next_token

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch. key: None in an evaluation; there is no noise either way."""
        evaluation = context_of(batch, None)
        output = model(batch["inputs"], dataclasses.replace(evaluation, train=True))
        tokens = jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32)
        losses = [jnp.ravel(leaf) for name, leaf in output.aux.items() if name.split("/")[-1] == "auxiliary_bce"]
        if not losses:
            raise UserError(
                "AuxiliaryRouters found no auxiliary router in the model: set ModalityMoE.auxiliary or "
                "MixtureOfDepths.auxiliary to auxiliary_router.AuxiliaryRouter."
            )
        loss = Mean(jnp.mean(jnp.concatenate(losses)) * tokens, tokens)
        metrics = {"loss": loss} | read_aux(output.aux, tokens)[1]
        if key is None:
            plain = self.next_token(model, batch, None)[1]
            metrics |= {f"next_token/{name}": mean for name, mean in plain.items() if not name.startswith("layers/")}
        return loss, metrics
