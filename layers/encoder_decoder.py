"""EncoderDecoder: a source row in, a target row continued."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, taps
from layers.block import RESIDUAL, WHOLE, Aux, Block
from layers.context import Context, Source
from layers.embed import Embed, Head, refuse_tied
from layers.language_model import Output, is_causal, mask_padding
from layers.parts import parts
from layers.relative_attention import CrossAttention, RelativeAttention
from layers.stack import Stack


class EncoderDecoder(nnx.Module):
    """Two stacks around one embedding (T5, arXiv 1910.10683): the encoder reads the source, and the decoder, whose
    blocks mix by CrossAttention in turn with self-attention, predicts the target.

    tokens_BT: int32 [B, T], with Context.source the int32 [B, S] rows of the other side -> Output with hidden_BTD;
    `logits(hidden_BTD)` -> float32 [B, T, V], V = `padded_vocab`. aux: {"encoder": ..., "decoder": ...}.

    Knobs:
        vocab >= 1; dim D >= 1; encoder, decoder: factories of stacks; norm: factory of the norm behind each of them;
        embed, head: factories (T5 v1.0: a tied head with scale D^-0.5; v1.1: not tied).
        bias: factory of a bias by distance such as RelativeBias, made once for each stack and shared by all its layers;
        None where the layers know positions by themselves.
        vocab_multiple: the tables are padded to a multiple of it; logits of the padding are -inf.
    Decoding: `given(source)` has the interface of LanguageModel.
    Refuses a bias that no layer of a stack would read.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        encoder: Callable,
        decoder: Callable,
        norm: Callable,
        embed: Callable = Embed,
        head: Callable = Head,
        bias: Callable | None = None,
        vocab_multiple: int = 1,
        rngs: nnx.Rngs,
    ):
        for name, value in (("vocab", vocab), ("dim", dim), ("vocab_multiple", vocab_multiple)):
            if value < 1:
                raise ValueError(f"EncoderDecoder.{name}={value} must be at least 1")
        self.vocab, self.dim = vocab, dim
        self.padded_vocab = -(-vocab // vocab_multiple) * vocab_multiple
        self.embed = embed(self.padded_vocab, dim, rngs=rngs)
        self.encoder, self.decoder = encoder(dim, rngs=rngs), decoder(dim, rngs=rngs)
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            if bias is not None and not _reads_bias(stack):
                raise ValueError(
                    f"EncoderDecoder.bias is read by no layer of the {name}: mix by RelativeAttention without a bias "
                    "of its own, or leave it None"
                )
        self.encoder_norm, self.decoder_norm = norm(dim, rngs=rngs), norm(dim, rngs=rngs)
        self.encoder_bias = None if bias is None else bias(bidirectional=True, rngs=rngs)
        self.decoder_bias = None if bias is None else bias(bidirectional=False, rngs=rngs)
        self.head = head(self.padded_vocab, dim, rngs=rngs)
        refuse_tied(self.embed, self.head)

    @property
    def causal(self) -> bool:
        """Whether no target token sees a later one."""
        return is_causal(self.decoder)

    def _embedded(self, tokens_BT: jax.Array, ctx: Context) -> jax.Array:
        return taps.tap("residual", self.embed(tokens_BT, ctx), self.embed)

    def encode(self, source: Source, *, key: jax.Array | None = None, train: bool = False) -> tuple[jax.Array, Aux]:
        """(memory_BSD, aux): what the decoder sees of a source."""
        index_1S = jnp.arange(source.tokens_BS.shape[1])[None]
        bias_BHSS = None if self.encoder_bias is None else self.encoder_bias(index_1S, index_1S)
        ctx = Context(source.positions_BS, source.segments_BS, key=key, train=train, bias_BHTS=bias_BHSS)
        x_BSD = axes.constrain(self._embedded(source.tokens_BS, ctx), *RESIDUAL)
        x_BSD, aux = self.encoder(x_BSD, ctx)
        return axes.constrain(self.encoder_norm(x_BSD), *WHOLE), aux

    def __call__(self, tokens_BT: jax.Array, ctx: Context) -> Output:
        if ctx.source is None:
            raise ValueError(
                "EncoderDecoder needs Context.source and rows of plain text have none: give the batch the fields "
                "`sources`, `source_positions` and `source_segment_ids`, or train a LanguageModel on them"
            )
        keys = (None, None) if ctx.key is None else jax.random.split(ctx.key)
        memory_BSD, encoder_aux = self.encode(ctx.source, key=keys[0], train=ctx.train)
        index_1T = jnp.arange(tokens_BT.shape[1])[None]
        bias_BHTS = None if self.decoder_bias is None else self.decoder_bias(index_1T, index_1T)
        ctx = ctx.replace(memory_BSD=memory_BSD, bias_BHTS=bias_BHTS, key=keys[1])
        x_BTD = axes.constrain(self._embedded(tokens_BT, ctx), *RESIDUAL)
        x_BTD, aux = self.decoder(x_BTD, ctx)
        hidden_BTD = axes.constrain(self.decoder_norm(x_BTD), *WHOLE)
        return Output(hidden_BTD, {"encoder": encoder_aux, "decoder": aux})

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Float32 logits [B, T, padded_vocab] of any chunk of hidden states."""
        logits_BTV = mask_padding(self.head(hidden_BTD, self.embed.weights()), self.vocab)
        return axes.constrain(logits_BTV, "batch", "length", "act_vocab")

    def given(self, source: Source) -> "Given":
        """This model with its source fixed: it decodes like a LanguageModel."""
        return Given(self, source)

    def init_cache(self, source: Source, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The cache of targets of at most `length` tokens. Runs the encoder and makes the keys and values that the
        decoder has of the source, once for all steps. Refuses to decode from no source."""
        if not isinstance(source, Source):
            raise ValueError("EncoderDecoder decodes from a source and got none: use EncoderDecoder.given(source)")
        memory_BSD, _ = self.encode(source)
        segments_BS = source.segments_BS
        real_BS = jnp.ones(source.tokens_BS.shape, bool) if segments_BS is None else segments_BS > 0
        batch = source.tokens_BS.shape[0]
        empty = self.decoder.init_cache(batch, length, dtype, source=True)
        return {
            "length_B": jnp.zeros(batch, jnp.int32),
            "slots_S": jnp.arange(length, dtype=jnp.int32),
            "stack": _remember(self.decoder, empty, memory_BSD, real_BS, dtype),
        }

    def extend(
        self, tokens_BT: jax.Array, cache: dict[str, Any], lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Appends T tokens to each target, as LanguageModel.extend does."""
        start_B, slots_S = cache["length_B"], cache["slots_S"]
        B, T = tokens_BT.shape
        lengths_B = jnp.full(B, T, jnp.int32) if lengths_B is None else lengths_B.astype(jnp.int32)
        positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        bias_BHTS = None if self.decoder_bias is None else self.decoder_bias(positions_BT, slots_S[None])
        ctx = Context(positions_BT, None, lengths_B, bias_BHTS=bias_BHTS)
        x_BTD, stack = self.decoder.extend(self._embedded(tokens_BT, ctx), cache["stack"], ctx)
        return self.decoder_norm(x_BTD), {"length_B": start_B + lengths_B, "slots_S": slots_S, "stack": stack}

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs a target token, where the source has as many tokens as the target, `length`: three times the
        forward matrix products of both stacks and the head."""
        stacks = self.encoder.flops_per_token(length) + self.decoder.flops_per_token(length)
        return 3.0 * (2 * self.embed.flops_per_token() + stacks + self.head.flops_per_token(self.vocab))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model", "source"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Given:
    """An EncoderDecoder and the source that it decodes from: `init_cache`, `extend` and `logits` of LanguageModel."""

    model: EncoderDecoder
    source: Source

    @property
    def vocab(self) -> int:
        return self.model.vocab

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        rows = self.source.tokens_BS.shape[0]
        if batch != rows:
            raise ValueError(f"a cache for {batch} rows does not fit the {rows} rows of the source: give one for each")
        return self.model.init_cache(self.source, length, dtype)

    def extend(
        self, tokens_BT: jax.Array, cache: dict[str, Any], lengths_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        return self.model.extend(tokens_BT, cache, lengths_B)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        return self.model.logits(hidden_BTD)


def _reads_bias(stack: Stack) -> bool:
    return any(part.bias is None for part in parts(stack, RelativeAttention))


def _remember(stack: Stack, cache: dict[str, Any], memory_BSD, real_BS, dtype: jnp.dtype) -> dict[str, Any]:
    """The decoder's cache with the source in the entries of its cross-attentions."""

    def fill(blocks: nnx.List, caches: tuple) -> tuple:
        return tuple(
            block.mixer.remember(memory_BSD, real_BS, dtype)
            if isinstance(block, Block) and isinstance(block.mixer, CrossAttention)
            else cache
            for block, cache in zip(blocks, caches, strict=True)
        )

    return {
        "prefix": fill(stack.prefix, cache["prefix"]),
        "periods": jax.vmap(fill)(stack.periods, cache["periods"]) if stack.repeats else cache["periods"],
        "suffix": fill(stack.suffix, cache["suffix"]),
    }
