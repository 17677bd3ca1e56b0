"""LanguageModel: tokens in, hidden states and logits out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.block import Aux
from layers.context import Context
from layers.embed import Embed, Head


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden_BTD", "aux"], meta_fields=[])
@dataclasses.dataclass
class Output:
    """hidden_BTD after the final norm (logits are made from it, so that a loss may chunk them); aux of the layers."""

    hidden_BTD: jax.Array
    aux: Aux


class LanguageModel(nnx.Module):
    """Embedding, stack, final norm and head.

    tokens_BT: int32 [B, T] -> Output with hidden_BTD; `logits(hidden_BTD)` -> float32 [B, T, V], V = `padded_vocab`.

    Knobs:
        vocab >= 1 token ids; dim D >= 1; stack, embed, head: factories; norm: factory of the final norm, None for none
        (post-norm blocks).
        modality_starts: first token id of modality 1, 2, ..., ascending; ids below the first are modality 0 (text).
        Empty for a model of one modality, whose layers get no modality ids.
        vocab_multiple: the tables are padded to a multiple of it, so that the vocabulary divides over a mesh and fills
        the matrix unit; logits of the padding are -inf.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        stack: Callable,
        norm: Callable | None,
        embed: Callable = Embed,
        head: Callable = Head,
        modality_starts: tuple[int, ...] = (),
        vocab_multiple: int = 1,
        rngs: nnx.Rngs,
    ):
        for name, value in (("vocab", vocab), ("dim", dim), ("vocab_multiple", vocab_multiple)):
            if value < 1:
                raise ValueError(f"LanguageModel.{name}={value} must be at least 1")
        if list(modality_starts) != sorted({s for s in modality_starts if 0 < s < vocab}):
            raise ValueError(
                f"LanguageModel.modality_starts={modality_starts} must ascend strictly between 0 and vocab={vocab}"
            )
        self.vocab, self.dim, self.modality_starts = vocab, dim, tuple(modality_starts)
        self.padded_vocab = -(-vocab // vocab_multiple) * vocab_multiple
        self.embed = embed(self.padded_vocab, dim, rngs=rngs)
        self.stack = stack(dim, rngs=rngs)
        self.norm = None if norm is None else norm(dim, rngs=rngs)
        self.head = head(self.padded_vocab, dim, rngs=rngs)

    def _hidden(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def modality(self, tokens_BT: jax.Array) -> jax.Array | None:
        """int32 modality id of each token, [B, T]: how many of `modality_starts` are not above it."""
        if not self.modality_starts:
            return None
        return sum((tokens_BT >= start).astype(jnp.int32) for start in self.modality_starts)

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> Output:
        ctx = ctx.replace(modality_BT=self.modality(tokens_BT))
        x_BTD = axes.constrain(self.embed(tokens_BT, ctx), "batch", "length", "act_embed")
        x_BTD, aux = self.stack(x_BTD, ctx)
        return Output(axes.constrain(self._hidden(x_BTD), "batch", "length", "act_embed"), aux)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, padded_vocab] of any chunk of hidden states."""
        logits_BTV = self.head(hidden_BTD, self.embed.table[...])
        if self.padded_vocab != self.vocab:
            logits_BTV = jnp.where(jnp.arange(self.padded_vocab) < self.vocab, logits_BTV, -jnp.inf)
        return axes.constrain(logits_BTV, "batch", "length", "act_vocab")

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """An empty cache for `batch` rows of at most `length` tokens: {"length_B": tokens so far, "stack": ...}."""
        return {"length_B": jnp.zeros(batch, jnp.int32), "stack": self.stack.init_cache(batch, length, dtype)}

    def extend(
        self, tokens_BT: jax.Array, cache: dict[str, Any], lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens to each row, the first lengths_B of them real (None: all), the rest padding on the right.

        Prefill, a further chunk and a single step are this one call. Returns hidden_BTD of the new tokens (junk at
        padding) and the new cache. The caller keeps length_B + T within the cache's length: a token past the end of a
        full cache is not stored.
        """
        start_B = cache["length_B"]
        B, T = tokens_BT.shape
        lengths_B = jnp.full(B, T, jnp.int32) if lengths_B is None else lengths_B.astype(jnp.int32)
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        modality_BT = self.modality(tokens_BT)
        ctx = Context(positions_BT=positions_BT, segments_BT=None, lengths_B=lengths_B, modality_BT=modality_BT)
        x_BTD, stack = self.stack.extend(self.embed(tokens_BT, ctx), cache["stack"], ctx)
        return self._hidden(x_BTD), {"length_B": start_B + lengths_B, "stack": stack}

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token of a row of `length`: three times the forward matrix products with the head, causal
        attention counted by visible keys; the embedding lookup, norms, softmax and rematerialisation count nothing."""
        return 3.0 * (self.stack.flops_per_token(length) + 2.0 * self.dim * self.vocab)
