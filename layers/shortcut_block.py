"""A block whose mixture of experts runs beside the next layer's dense parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.block import Aux, enter, join, leave, refuse_cut_rows, refuse_lost_prefix
from layers.context import Context


class ShortcutBlock(nnx.Module):
    """Two mixers, two dense feed-forwards and one mixture of experts (ScMoE: Cai et al. 2024, arXiv 2404.05019; as in
    LongCat-Flash, arXiv 2509.01322, section 2.2):

        h = x + mixer_0(norm(x));  u = norm(h);  m = moe(u)
        h = h + ffn_0(u);  h = h + mixer_1(norm(h));  y = h + ffn_1(norm(h)) + m

    m depends on u alone and is needed only at the end, so the exchange between experts' devices overlaps with the dense
    half. It counts as one block of a Stack's depth and stands in its pattern where a Block would.

    x and y: [B, T, D]. aux: losses summed under "loss", metrics under "mixer/NAME" and "second_mixer/NAME",
    "ffn/NAME" of the mixture (as a Block with a mixture reports it), "dense/NAME" and "second_dense/NAME".
    Knobs: mixer, ffn (dense), moe, norm: factories; mixers and dense feed-forwards are made twice, norms four times.
    shortcut: True adds m at the end, False right after ffn_0, the ordinary order, for comparison.
    The cache is one of each mixer. Refuses a prefix (Context.prefix_BT) where the mixers would ignore it.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: Callable,
        ffn: Callable,
        moe: Callable,
        norm: Callable,
        shortcut: bool = True,
        rngs: nnx.Rngs,
    ):
        self.shortcut = shortcut
        self.mixer, self.second_mixer = mixer(dim, rngs=rngs), mixer(dim, rngs=rngs)
        self.ffn, self.second_ffn = ffn(dim, rngs=rngs), ffn(dim, rngs=rngs)
        self.moe = moe(dim, rngs=rngs)
        self.mixer_norm, self.second_mixer_norm = norm(dim, rngs=rngs), norm(dim, rngs=rngs)
        self.ffn_norm, self.second_ffn_norm = norm(dim, rngs=rngs), norm(dim, rngs=rngs)

    def _run(self, x_BTD, mix: Callable, second_mix: Callable, ctx: Context) -> tuple[jax.Array, Aux, Any, Any]:
        """(y, aux, what the first mixer gives beside its output, the same of the second)."""
        refuse_lost_prefix(self, ctx)
        refuse_cut_rows(self, ctx)
        mixed_BTD, first = mix(enter(self.mixer_norm(x_BTD)))
        h_BTD = x_BTD + leave(mixed_BTD)
        u_BTD = enter(self.ffn_norm(h_BTD))
        m_BTD, moe_aux = self.moe(u_BTD, ctx)
        m_BTD = leave(m_BTD)
        dense_BTD, dense_aux = self.ffn(u_BTD, ctx)
        h_BTD = h_BTD + leave(dense_BTD)
        if not self.shortcut:
            h_BTD = h_BTD + m_BTD
        mixed_BTD, second = second_mix(enter(self.second_mixer_norm(h_BTD)))
        h_BTD = h_BTD + leave(mixed_BTD)
        u_BTD = enter(self.second_ffn_norm(h_BTD))
        dense_BTD, second_dense_aux = self.second_ffn(u_BTD, ctx)
        y_BTD = h_BTD + leave(dense_BTD)
        aux = {"ffn": moe_aux, "dense": dense_aux, "second_dense": second_dense_aux}
        return y_BTD + m_BTD if self.shortcut else y_BTD, aux, first, second

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        y_BTD, aux, first, second = self._run(
            x_BTD, lambda h: self.mixer(h, ctx), lambda h: self.second_mixer(h, ctx), ctx
        )
        return y_BTD, join({"mixer": first, "second_mixer": second} | aux)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[Any, Any]:
        return self.mixer.init_cache(batch, length, dtype), self.second_mixer.init_cache(batch, length, dtype)

    def extend(self, x_BTD: jax.Array, cache: tuple[Any, Any], ctx: Context) -> tuple[jax.Array, tuple[Any, Any]]:
        """The same while decoding; losses and metrics are for training alone."""
        y_BTD, _, first, second = self._run(
            x_BTD,
            lambda h: self.mixer.extend(h, cache[0], ctx),
            lambda h: self.second_mixer.extend(h, cache[1], ctx),
            ctx,
        )
        return y_BTD, (first, second)

    def flops_per_token(self, length: int) -> float:
        parts = (self.mixer, self.second_mixer, self.ffn, self.second_ffn, self.moe)
        return sum(part.flops_per_token(length) for part in parts)
