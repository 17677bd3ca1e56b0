"""LanguageModel: tokens in, hidden states and logits out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, taps
from layers.attention import Attention
from layers.block import RESIDUAL, WHOLE, Aux
from layers.context import Context
from layers.embed import Embed, Head, refuse_tied
from layers.parts import parts
from layers.relative_attention import RelativeAttention


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
        mtp: factory of modules that train to predict further ahead, such as MultiToken, or None; decoding has no use
        for them.
        prompt: what `extend` makes of the tokens with which a row begins: "causal", nothing; "prefix", they all see
        each other (Context.prefix_BT); "blank", that too, and what follows fills a blank which is the last of them, in
        two-dimensional positions (RoPE2D).
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
        mtp: Callable | None = None,
        prompt: Literal["causal", "prefix", "blank"] = "causal",
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
        if prompt not in ("causal", "prefix", "blank"):
            raise ValueError(f"LanguageModel.prompt={prompt!r} must be 'causal', 'prefix' or 'blank'")
        self.vocab, self.dim, self.modality_starts, self.prompt = vocab, dim, tuple(modality_starts), prompt
        self.modalities = len(modality_starts) + 1 if modality_starts else None
        self.padded_vocab = -(-vocab // vocab_multiple) * vocab_multiple
        self.embed = embed(self.padded_vocab, dim, rngs=rngs)
        self.stack = stack(dim, rngs=rngs)
        self.norm = None if norm is None else norm(dim, rngs=rngs)
        self.head = head(self.padded_vocab, dim, rngs=rngs)
        refuse_tied(self.embed, self.head)
        self.mtp = None if mtp is None else mtp(dim, rngs=rngs)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one, but for a prefix."""
        return is_causal((self.stack, self.mtp))

    def _hidden(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def modality(self, tokens_BT: jax.Array) -> jax.Array | None:
        """int32 modality id of each token, [B, T]: how many of `modality_starts` are not above it."""
        if not self.modality_starts:
            return None
        return sum((tokens_BT >= start).astype(jnp.int32) for start in self.modality_starts)

    def context(self, tokens_BT: jax.Array, ctx: Context) -> Context:
        """What the layers read of a call on these tokens."""
        if ctx.source is not None:
            raise ValueError(
                "LanguageModel does not read Context.source: drop the batch's `sources` fields, or use EncoderDecoder"
            )
        return ctx.replace(modality_BT=self.modality(tokens_BT), modalities=self.modalities)

    def _embedded(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        return taps.tap("residual", self.embed(tokens_BT, ctx), self.embed)

    def enter(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        """What the stack begins with, [B, T, D]."""
        return axes.constrain(self._embedded(tokens_BT, ctx), *RESIDUAL)

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        """hidden_BTD of what the stack ends with."""
        return axes.constrain(self._hidden(x_BTD), *WHOLE)

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> Output:
        ctx = self.context(tokens_BT, ctx)
        x_BTD, aux = self.stack(self.enter(tokens_BT, ctx), ctx)
        return Output(self.leave(x_BTD), aux)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, padded_vocab] of any chunk of hidden states."""
        logits_BTV = mask_padding(self.head(hidden_BTD, self.embed.weights()), self.vocab)
        return axes.constrain(logits_BTV, "batch", "length", "act_vocab")

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """An empty cache for `batch` rows of at most `length` tokens: {"length_B": tokens so far, "stack": ...}, and
        "prefix_B", tokens of the prefix, where the prompt is one."""
        cache = {"length_B": jnp.zeros(batch, jnp.int32), "stack": self.stack.init_cache(batch, length, dtype)}
        return cache if self.prompt == "causal" else cache | {"prefix_B": jnp.zeros(batch, jnp.int32)}

    def extend(
        self, tokens_BT: jax.Array, cache: dict[str, Any], lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens to each row, the first lengths_B of them real (None: all), the rest padding on the right.

        Prefill, a further chunk and a single step are this one call. Returns hidden_BTD of the new tokens (junk at
        padding) and the new cache. The caller keeps length_B + T within the cache's length: a token past the end of a
        full cache is not stored. A prefix comes whole: it is what the first call that has tokens for a row brings.
        """
        start_B = cache["length_B"]
        B, T = tokens_BT.shape
        lengths_B = jnp.full(B, T, jnp.int32) if lengths_B is None else lengths_B.astype(jnp.int32)
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        ctx = Context(positions_BT=positions_BT, segments_BT=None, lengths_B=lengths_B)
        ctx = ctx.replace(modality_BT=self.modality(tokens_BT), modalities=self.modalities)
        new = {"length_B": start_B + lengths_B}
        if self.prompt != "causal":
            ctx, new["prefix_B"] = self._see_prefix(ctx, start_B, cache["prefix_B"])
        x_BTD, new["stack"] = self.stack.extend(self._embedded(tokens_BT, ctx), cache["stack"], ctx)
        return self._hidden(x_BTD), new

    def _see_prefix(self, ctx: Context, start_B: jax.Array, prefix_B: jax.Array) -> tuple[Context, jax.Array]:
        """The context with the fields of a prompt that is a prefix, and how many tokens that has in each row."""
        first_B = start_B == 0
        prefix_B = jnp.where(first_B, ctx.lengths_B, prefix_B)
        prefix_BT = first_B[:, None] & (ctx.positions_BT < prefix_B[:, None])
        if self.prompt == "blank":
            blocks_BT = jnp.maximum(ctx.positions_BT - prefix_B[:, None] + 1, 0)
            ctx = ctx.replace(blocks_BT=blocks_BT, anchors_BT=ctx.positions_BT - blocks_BT)
        return ctx.replace(prefix_BT=prefix_BT), prefix_B

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a token of a row of `length`: three times the forward matrix products with the head, causal
        attention counted by visible keys; the embedding lookup, norms, softmax and rematerialisation count nothing."""
        head = self.head.flops_per_token(self.vocab)
        ahead = 0.0 if self.mtp is None else self.mtp.flops_per_token(length, head)
        return 3.0 * (self.embed.flops_per_token() + self.stack.flops_per_token(length) + head + ahead)


def is_causal(network: Any) -> bool:
    """Whether every attention in a tree of modules is causal; all other mixers are."""
    return all(mixer.causal for mixer in parts(network, (Attention, RelativeAttention)))


def mask_padding(logits_BTV: jax.Array, vocab: int) -> jax.Array:
    """-inf for the logits of ids from `vocab` on, which only pad the table."""
    padded = logits_BTV.shape[-1]
    return logits_BTV if padded == vocab else jnp.where(jnp.arange(padded) < vocab, logits_BTV, -jnp.inf)
