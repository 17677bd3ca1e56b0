"""Context: what any layer may read besides its input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


class ReadsPrefix:
    """Marks a mixer that honours `Context.prefix_BT`. Block refuses a prefix on any other: it would be ignored."""


class CutsLength:
    """Marks a mixer that works on rows whose length is cut over devices (context parallel): by a ring of keys, by
    states passed on, by a halo. Block refuses any other there."""


class AnyOrder(CutsLength):
    """Marks a mixer that reads the order of a row's tokens from `Context.order_BT`, so that devices may hold any of
    them (causal load balance). Block refuses rows out of order on any other."""


class InOrder:
    """Marks a part beside the mixers, such as a block around blocks, that needs the tokens of a row in order."""


class ReadsFuture:
    """Marks a feed-forward whose output for a token may depend on later ones. Block asks it before it makes a cache."""

    def check_decoding(self) -> None:
        """Raises ValueError, naming the knob, where it cannot work token by token."""
        raise ValueError(f"{type(self).__name__} cannot decode: what it does with a token depends on later ones")


class ReadsSource:
    """Marks a mixer whose cache is made from the encoded source of an encoder-decoder. Stack has none for it
    elsewhere."""


class CountsLayers:
    """Marks a mixer with a knob that says how many layers the network has. Stack, which knows, asks it."""

    def check_layers(self, count: int) -> None:
        """Raises ValueError, naming the knob, where it does not go with `count` layers."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tokens_BS", "positions_BS", "segments_BS"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Source:
    """The input side of an encoder-decoder.

    tokens_BS, positions_BS: int32 [B, S], as the fields of the same name of the decoder. segments_BS: 0 is padding; a
    decoder token sees the source tokens of its own segment, or all but padding where the decoder's rows are unpacked.
    None where every row is one document without padding.
    """

    tokens_BS: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array | None

    @classmethod
    def of(cls, tokens_BS: jax.Array, lengths_B: jax.Array | None = None) -> "Source":
        """Unpacked rows, of which the first lengths_B tokens are real (None: all)."""
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        segments_BS = None if lengths_B is None else (positions_BS < lengths_B[:, None]).astype(jnp.int32)
        return cls(tokens_BS, positions_BS, segments_BS)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "positions_BT",
        "segments_BT",
        "lengths_B",
        "modality_BT",
        "layer",
        "key",
        "prefix_BT",
        "anchors_BT",
        "blocks_BT",
        "source",
        "memory_BSD",
        "bias_BHTS",
        "slots_BT",
        "order_BT",
    ],
    meta_fields=["train", "modalities"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """Positions, packing and randomness of one call.

    positions_BT: position of each token inside its own document (or, while decoding, inside its row): rotary angles.
    segments_BT: which packed document a token belongs to, from 1; 0 is padding. Tokens of different segments never
        see each other, in any mixer. None where each row is one document, which spares attention a mask.
    lengths_B: while decoding, how many of the T tokens of each row are real; the rest are padding on the right.
        None in training and whenever all are.
    modality_BT: modality id of each token, or None for a model of one modality.
    layer: index of the layer, a traced scalar set by Stack.
    key: key of this call's randomness (dropout, router noise), or None; Stack folds the layer index in.
    prefix_BT: bool; a prefix token is seen by every token of its segment, whatever causality says (prefix LM). While
        decoding it speaks of the T new tokens: a prefix comes whole, in one call. None for no prefix.
    blocks_BT: int32, second channel of two-dimensional rotary positions: place inside a blank that is filled in, from
        1; 0 outside. anchors_BT: their first channel, None for positions_BT.
    source, memory_BSD: input side of an encoder-decoder, and its encoded form, which the network sets for its decoder.
    bias_BHTS: what is added to the scores of self-attention, shared by the layers of a stack (B may be 1); set by a
        network whose layers take it (T5).
    slots_BT: while decoding, where in its layer's cache each new token goes; None for at its position. A layer that
        gets only some of the tokens (mixture of depths) fills its cache without gaps. Read it as `cache_slots_BT`.
    order_BT: int32, the place of each token in its row, where rows are not stored in order; None where they are. It and
        not positions_BT, which restart in every document, says what lies in a token's past.
    train: whether this is a training step (static).
    modalities: how many modalities there are, where modality_BT says which; None if unknown (static).
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    lengths_B: jax.Array | None = None
    modality_BT: jax.Array | None = None
    layer: jax.Array | None = None
    key: jax.Array | None = None
    prefix_BT: jax.Array | None = None
    anchors_BT: jax.Array | None = None
    blocks_BT: jax.Array | None = None
    source: Source | None = None
    memory_BSD: jax.Array | None = None
    bias_BHTS: jax.Array | None = None
    slots_BT: jax.Array | None = None
    order_BT: jax.Array | None = None
    train: bool = False
    modalities: int | None = None

    @classmethod
    def of(cls, tokens_BT: jax.Array, **fields) -> "Context":
        """The context of unpacked rows: positions 0..T-1, one document a row."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        return cls(**({"positions_BT": positions_BT, "segments_BT": None} | fields))

    @property
    def decoding(self) -> bool:
        """Whether this call extends a cache: what follows is not there yet."""
        return self.lengths_B is not None

    @property
    def cache_slots_BT(self) -> jax.Array:
        """Where in a cache of whole rows the new tokens go."""
        return self.positions_BT if self.slots_BT is None else self.slots_BT

    def replace(self, **changes) -> "Context":
        return dataclasses.replace(self, **changes)
