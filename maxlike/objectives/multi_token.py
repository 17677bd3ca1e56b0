"""Multi-token prediction."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from layers.language_model import LanguageModel
from layers.multi_token import shift
from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.cross_entropy import cross_entropy
from maxlike.objectives.next_token import NextToken


class MultiToken(NextToken):
    """NextToken plus `weight` times the cross-entropy of the tokens further ahead (DeepSeek-V3, arXiv 2412.19437, eq.
    24 and 25; LongCat-Flash, arXiv 2509.01322).

    Reads what NextToken reads. The model has modules behind it (`LanguageModel.mtp`); the n-th predicts token
    t + n + 1 from the tokens up to t + n, where that lies in the same segment and has a weight.

    weight: of the mean over the modules, >= 0. A module's cross-entropy is summed over its targets and divided, as in
        eq. 24, by the number of next tokens, so that micro-batches add up to the batch.
    z_loss, chunk: as in NextToken; z_loss is for the next token alone.

    Metrics: NextToken's, mtp_loss (nats a token, over all modules), mtp_accuracy, and what the modules' blocks report.
    Raises UserError for a knob outside its range and a model without modules.
    """

    def __init__(self, *, weight: float = 0.1, z_loss: float = 0.0, chunk: int | None = None):
        super().__init__(z_loss=z_loss, chunk=chunk)
        if not 0 <= weight < math.inf:
            raise UserError(f"MultiToken.weight={weight} must not be negative.")
        self.weight = weight

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch. key: randomness of a training call; None: evaluation."""
        if not isinstance(model, LanguageModel) or model.mtp is None:
            raise UserError("MultiToken needs a model with LanguageModel.mtp: bind it to multi_token.MultiToken.")
        context = context_of(batch, key)
        output = self.run(model, batch, context)
        loss, metrics = self.score(model, batch, output)
        total, nats, correct, targets = loss.total, 0.0, 0.0, 0.0
        ahead = model.mtp(output.hidden_BTD, batch["targets"], model.embed, context)
        for depth, (hidden_BTD, aux) in enumerate(ahead, 1):
            same_BT = (shift(batch["segment_ids"], depth) == batch["segment_ids"]) & (batch["segment_ids"] > 0)
            weights_BT = jnp.where(same_BT, shift(batch["loss_weights"].astype(jnp.float32), depth), 0.0)
            nats_n, sums = cross_entropy(
                model.logits, hidden_BTD, shift(batch["targets"], depth), weights_BT, z_loss=0.0, chunk=self.chunk
            )
            total = total + self.weight / len(ahead) * nats_n
            nats, correct, targets = nats + sums.nats, correct + sums.correct, targets + jnp.sum(weights_BT)
            losses, reported = read_aux(aux, loss.weight, f"mtp/{depth}")
            total, metrics = total + losses, metrics | reported
        metrics |= {"mtp_loss": Mean(nats, targets), "mtp_accuracy": Mean(correct, targets)}
        return Mean(total, loss.weight), metrics
