"""Rotary positions in two channels, for models that fill in blanks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from layers.rope import RoPE


@dataclasses.dataclass(frozen=True)
class RoPE2D:
    """The first half of each head turns by one position, the second half by another (GLM, arXiv 2103.10360; xTrimoPGLM,
    arXiv 2401.06199).

    Called with x [B, T, heads, head_dim], anchors_BT (place in the text whose blanks are single tokens) and blocks_BT
    (place inside the blank, 0 outside), returns x rotated, same shape and dtype. Frequencies are those of a head of
    head_dim / 2.

    Knobs: base > 0; layout of the pairs inside each half, as in RoPE.
    Refuses a head_dim that 4 does not divide, and a call without the second channel.
    """

    head_dim: int
    _: dataclasses.KW_ONLY
    base: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"

    def __post_init__(self):
        if self.head_dim % 4:
            raise ValueError(f"RoPE2D needs a head_dim that 4 divides, got {self.head_dim}: change Attention.head_dim")
        self._half()

    def _half(self) -> RoPE:
        return RoPE(self.head_dim // 2, base=self.base, layout=self.layout)

    def __call__(self, x: jax.Array, anchors_BT: jax.Array, blocks_BT: jax.Array | None) -> jax.Array:
        if blocks_BT is None:
            raise ValueError(
                "RoPE2D reads Context.blocks_BT, which is None: give the batch a `blocks` field, or use RoPE"
            )
        first, second = jnp.split(x, 2, axis=-1)
        rope = self._half()
        return jnp.concatenate([rope(first, anchors_BT), rope(second, blocks_BT)], -1)
