"""Context: what any layer may read besides its input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_BT", "segments_BT", "lengths_B", "modality_BT", "layer", "key"],
    meta_fields=["train"],
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
    train: whether this is a training step (static).
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    lengths_B: jax.Array | None = None
    modality_BT: jax.Array | None = None
    layer: jax.Array | None = None
    key: jax.Array | None = None
    train: bool = False

    @classmethod
    def of(cls, tokens_BT: jax.Array, **fields) -> "Context":
        """The context of unpacked rows: positions 0..T-1, one document a row."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        return cls(**({"positions_BT": positions_BT, "segments_BT": None} | fields))

    @property
    def decoding(self) -> bool:
        """Whether this call extends a cache: what follows is not there yet."""
        return self.lengths_B is not None

    def replace(self, **changes) -> "Context":
        return dataclasses.replace(self, **changes)
