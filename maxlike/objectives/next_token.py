"""Next-token prediction."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from layers.context import Context
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel, Output
from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.cross_entropy import cross_entropy


class NextToken:
    """Mean cross-entropy of each next token, plus z-loss and the losses that layers report.

    Reads of the batch [B, T]: inputs, targets (int32), segment_ids, positions (int32), loss_weights (float32; 0 masks a
    target), target_bytes (int32, UTF-8 bytes of the target), and where present what `context_of` names. The model:
    `model(inputs, ctx)` gives hidden_BTD and aux, `model.logits(hidden_BTD)` float32 logits of any chunk.

    z_loss: coefficient of mean log(Z)^2, which keeps the softmax's normaliser Z near 1 (PaLM, arXiv 2204.02311, 1e-4),
        >= 0.
    chunk: positions whose logits exist at a time (for all rows), >= 1; None: at most a quarter of the length and
        32 MiB of logits a device on CPU, 1 GiB elsewhere.

    modalities: names of the modalities, in the order of their ids (LanguageModel.modality_starts), such as ("text",
        "image"): the loss is also reported for the targets of each. Empty: it is not.

    Metrics: loss (nats a token, without z-loss and layers' losses), loss/MODALITY, bits_per_byte (exact bytes of the
    weighted targets), accuracy, z_loss if it has a coefficient, and what the layers report, averaged over layers; a
    layer's own loss is summed over layers and also added to the objective.
    Raises UserError for a knob outside its range, and another number of names than the model has modalities.
    """

    def __init__(self, *, z_loss: float = 0.0, chunk: int | None = None, modalities: tuple[str, ...] = ()):
        if not 0 <= z_loss < math.inf:
            raise UserError(f"NextToken.z_loss={z_loss} must not be negative.")
        if chunk is not None and chunk < 1:
            raise UserError(f"NextToken.chunk={chunk} must be at least 1, or None to choose it by memory.")
        if len(set(modalities)) != len(modalities):
            raise UserError(f"NextToken.modalities={modalities} names one modality twice.")
        self.z_loss, self.chunk, self.modalities = z_loss, chunk, tuple(modalities)

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch. key: randomness of a training call; None: evaluation."""
        return self.score(model, batch, self.run(model, batch, context_of(batch, key)))

    def run(self, model: Any, batch: dict[str, jax.Array], context: Context) -> Output:
        """The model's output on the batch."""
        self.check(model)
        return model(batch["inputs"], context)

    def check(self, model: Any) -> None:
        """Raises UserError for a model whose tokens see the ones to predict."""
        if isinstance(model, LanguageModel | EncoderDecoder) and not model.causal:
            raise UserError(
                f"{type(self).__name__} needs a causal model: set Attention.causal = True, or take MaskedTokens."
            )

    def score(self, model: Any, batch: dict[str, jax.Array], output: Output) -> tuple[Mean, dict[str, Mean]]:
        """Loss and metrics of an output."""
        weights = batch["loss_weights"].astype(jnp.float32)
        parts_BTM = self._by_modality(model, batch["targets"])
        total, sums = cross_entropy(
            model.logits,
            output.hidden_BTD,
            batch["targets"],
            weights,
            z_loss=self.z_loss,
            chunk=self.chunk,
            parts_BTM=parts_BTM,
        )
        tokens = jnp.sum(weights)
        metrics = {
            "loss": Mean(sums.nats, tokens),
            "bits_per_byte": Mean(sums.nats / math.log(2), jnp.sum(weights * batch["target_bytes"])),
            "accuracy": Mean(sums.correct, tokens),
        }
        for m, name in enumerate(self.modalities):
            metrics[f"loss/{name}"] = Mean(sums.nats_M[m], jnp.sum(weights * parts_BTM[..., m]))
        if self.z_loss:
            metrics["z_loss"] = Mean(self.z_loss * sums.squared_log_z, tokens)
        losses, reported = read_aux(output.aux, tokens)
        return Mean(total + losses, tokens), metrics | reported

    def _by_modality(self, model: Any, targets_BT: jax.Array) -> jax.Array | None:
        """Bool [B, T, M]: which modality each target is of; None without names."""
        if not self.modalities:
            return None
        known = None if isinstance(model, EncoderDecoder) else model.modalities
        if known != len(self.modalities):
            raise UserError(
                f"NextToken.modalities names {len(self.modalities)} modalities and the model has "
                f"{known or 'one'}: set LanguageModel.modality_starts to the first id of each but the first."
            )
        return model.modality(targets_BT)[..., None] == jnp.arange(len(self.modalities))
