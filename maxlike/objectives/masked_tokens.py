"""Masked-token prediction, for encoders."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers import axes
from maxlike.errors import UserError
from maxlike.metrics import Mean
from maxlike.objectives.batch import context_of, read_aux
from maxlike.objectives.cross_entropy import cross_entropy


class MaskedTokens:
    """Mean cross-entropy of tokens hidden from a bidirectional model (BERT, arXiv 1810.04805; Ettin, arXiv 2507.11412).

    Each token is chosen with probability `rate`, on its own; of the chosen, most become the mask token, some a random
    id, some stay. Never chosen: padding, special ids, a document's first token (nothing precedes it, and its bytes are
    not in the batch). Reads of the batch [B, T]: inputs, segment_ids, positions (int32), target_bytes (for
    bits_per_byte, which here is that of the chosen tokens given all others).

    mask_id: id of the mask token. rate: in (0, 1); evaluation_rate: the same when evaluating, None for `rate`.
        random_share, keep_share: of the chosen, >= 0, at most 1 together.
    special_ids: ids that are never chosen.
    read: where the prediction is read, "same" position, or "previous", as a decoder gives it (masked next-token
        prediction, which makes an encoder of a decoder).
    chunk: as in NextToken.

    The head runs on the chosen positions alone: room for four standard deviations above their mean number in a row,
    the rest of a fuller row is dropped. Metrics: loss, bits_per_byte, accuracy, chosen (share of all tokens that are no
    padding), dropped (share of the chosen), and what layers report. An evaluation always hides the same tokens.
    Raises UserError for a knob outside its range, a causal model, and ids beyond its vocabulary.
    """

    def __init__(
        self,
        *,
        mask_id: int,
        rate: float = 0.3,
        evaluation_rate: float | None = 0.15,
        random_share: float = 0.1,
        keep_share: float = 0.1,
        special_ids: tuple[int, ...] = (),
        read: Literal["same", "previous"] = "same",
        chunk: int | None = None,
    ):
        for name, value in (("rate", rate), ("evaluation_rate", rate if evaluation_rate is None else evaluation_rate)):
            if not 0 < value < 1:
                raise UserError(f"MaskedTokens.{name}={value} is outside (0, 1).")
        if min(random_share, keep_share) < 0 or random_share + keep_share > 1:
            raise UserError(
                f"MaskedTokens.random_share={random_share} and keep_share={keep_share} must not be negative, "
                "nor above 1 together."
            )
        if mask_id < 0 or any(i < 0 for i in special_ids):
            raise UserError(f"MaskedTokens.mask_id={mask_id} and special_ids={special_ids} must not be negative.")
        if read not in ("same", "previous"):
            raise UserError(f"MaskedTokens.read={read!r} must be 'same' or 'previous'.")
        if chunk is not None and chunk < 1:
            raise UserError(f"MaskedTokens.chunk={chunk} must be at least 1, or None to choose it by memory.")
        self.mask_id, self.rate, self.read, self.chunk = mask_id, rate, read, chunk
        self.evaluation_rate = rate if evaluation_rate is None else evaluation_rate
        self.random_share, self.keep_share, self.special_ids = random_share, keep_share, tuple(special_ids)

    def noise(
        self, batch: dict[str, jax.Array], key: jax.Array, rate: float, vocab: int
    ) -> tuple[jax.Array, jax.Array]:
        """(inputs with noise, which positions were chosen), both [B, T]."""
        tokens_BT = batch["inputs"]
        pick, kind, draw = jax.random.split(key, 3)
        free_BT = (batch["segment_ids"] > 0) & (batch["positions"] > 0) & (jnp.arange(tokens_BT.shape[1]) > 0)
        for special in self.special_ids:
            free_BT = free_BT & (tokens_BT != special)
        chosen_BT = free_BT & jax.random.bernoulli(pick, rate, tokens_BT.shape)
        u_BT = jax.random.uniform(kind, tokens_BT.shape)
        random_BT = jax.random.randint(draw, tokens_BT.shape, 0, vocab, tokens_BT.dtype)
        noisy_BT = jnp.where(u_BT < self.random_share, random_BT, self.mask_id)
        noisy_BT = jnp.where(u_BT >= 1.0 - self.keep_share, tokens_BT, noisy_BT)
        return jnp.where(chosen_BT, noisy_BT, tokens_BT), chosen_BT

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        """Sums over the batch. key: randomness of a training call; None: evaluation."""
        if model.causal:
            raise UserError("MaskedTokens needs a bidirectional model: set Attention.causal = False.")
        largest = max((self.mask_id, *self.special_ids))
        if largest >= model.vocab:
            raise UserError(
                f"MaskedTokens.mask_id or special_ids hold {largest} and LanguageModel.vocab={model.vocab}: "
                "take ids of the vocabulary."
            )
        if "order" in batch:
            raise UserError(
                "MaskedTokens reads the token before each and the mesh holds rows out of order: set Mesh.balance=False."
            )
        rate = self.evaluation_rate if key is None else self.rate
        noise_key, model_key = (jax.random.key(0), None) if key is None else jax.random.split(key)
        noisy_BT, chosen_BT = self.noise(batch, noise_key, rate, model.vocab)
        output = model(noisy_BT, context_of(batch, model_key))

        T, parts = noisy_BT.shape[1], axes.shards("length")
        room = math.ceil(rate * T + 4 * math.sqrt(rate * (1 - rate) * T))
        room = min(T, -(-room // parts) * parts)  # the head's work is cut as rows are
        # The chosen positions of each row first, in order; a row's own gather stays on its device.
        index_BM = jnp.argsort(~chosen_BT, axis=1, stable=True)[:, :room]

        def take(x_BT: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x_BT, index_BM, axis=1)

        weights_BM = take(chosen_BT).astype(jnp.float32)
        at_BM = index_BM if self.read == "same" else jnp.maximum(index_BM - 1, 0)
        hidden_BMD = jnp.take_along_axis(output.hidden_BTD, at_BM[:, :, None], axis=1)
        total, sums = cross_entropy(
            model.logits, hidden_BMD, take(batch["inputs"]), weights_BM, z_loss=0.0, chunk=self.chunk
        )
        tokens, chosen = jnp.sum(weights_BM), jnp.sum(chosen_BT.astype(jnp.float32))
        bytes_BM = take(jnp.pad(batch["target_bytes"][:, :-1], ((0, 0), (1, 0))))  # an input is the target before it
        metrics = {
            "loss": Mean(sums.nats, tokens),
            "bits_per_byte": Mean(sums.nats / math.log(2), jnp.sum(weights_BM * bytes_BM)),
            "accuracy": Mean(sums.correct, tokens),
            "chosen": Mean(chosen, jnp.sum((batch["segment_ids"] > 0).astype(jnp.float32))),
            "dropped": Mean(chosen - tokens, chosen),
        }
        losses, reported = read_aux(output.aux, tokens)
        return Mean(total + losses, tokens), metrics | reported
