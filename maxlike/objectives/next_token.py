"""Next-token prediction."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from layers.context import Context
from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.objectives.cross_entropy import cross_entropy


class NextToken:
    """Mean cross-entropy of each next token, plus z-loss and the losses that layers report.

    Reads of the batch [B, T]: inputs, targets (int32), segment_ids, positions (int32), loss_weights (float32; 0 masks a
    target), target_bytes (int32, UTF-8 bytes of the target). The model: `model(inputs, ctx)` gives hidden_BTD and aux,
    `model.logits(hidden_BTD)` float32 logits of any chunk.

    z_loss: coefficient of mean log(Z)^2, which keeps the softmax's normaliser Z near 1 (PaLM, arXiv 2204.02311, 1e-4),
        >= 0.
    chunk: positions whose logits exist at a time (for all rows), >= 1; None: at most a quarter of the length and
        32 MiB of logits a device on CPU, 1 GiB elsewhere.

    Metrics: loss (nats a token, without z-loss and layers' losses), bits_per_byte (exact bytes of the weighted
    targets), accuracy, z_loss if it has a coefficient, and what the layers report, averaged over layers; a layer's own
    loss is summed over layers and also added to the objective.
    Raises UserError for a knob outside its range.
    """

    def __init__(self, *, z_loss: float = 0.0, chunk: int | None = None):
        if not 0 <= z_loss < math.inf:
            raise UserError(f"NextToken.z_loss={z_loss} must not be negative.")
        if chunk is not None and chunk < 1:
            raise UserError(f"NextToken.chunk={chunk} must be at least 1, or None to choose it by memory.")
        self.z_loss, self.chunk = z_loss, chunk

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch. key: randomness of a training call; None: evaluation."""
        context = Context(
            positions_BT=batch["positions"], segments_BT=batch["segment_ids"], key=key, train=key is not None
        )
        output = model(batch["inputs"], context)
        weights = batch["loss_weights"].astype(jnp.float32)
        total, sums = cross_entropy(
            model.logits, output.hidden_BTD, batch["targets"], weights, z_loss=self.z_loss, chunk=self.chunk
        )
        tokens = jnp.sum(weights)
        metrics = {
            "loss": Mean(sums.nats, tokens),
            "bits_per_byte": Mean(sums.nats / math.log(2), jnp.sum(weights * batch["target_bytes"])),
            "accuracy": Mean(sums.correct, tokens),
        }
        if self.z_loss:
            metrics["z_loss"] = Mean(self.z_loss * sums.squared_log_z, tokens)
        for path, leaf in jax.tree_util.tree_flatten_with_path(output.aux)[0]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            value = leaf.astype(jnp.float32)
            if name.split("/")[-1] == "loss":
                value = jnp.sum(value)
                total = total + value * tokens
            else:
                value = jnp.mean(value)
            metrics[f"layers/{name}"] = Mean(jax.lax.stop_gradient(value) * tokens, tokens)
        return Mean(total, tokens), metrics
