"""Short causal convolution along the row, one filter a channel, as recurrent mixers put behind their projections."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes


def uniform(bound: float) -> axes.Init:
    """Initialiser uniform in [-bound, bound): with 1 / sqrt(fan in) PyTorch's own for linear maps and convolutions."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class ShortConv(nnx.Module):
    """y_t = sum_j kernel[width - 1 - j] * x_{t-j} + bias, j = 0..width-1: a depthwise causal convolution.

    x and y: [B, T, *channels]; the sum is in float32, y has the dtype of x. A token sees nothing before its own row or
    segment. `channel_axes` are the logical axes of the channels; the kernel is [width, *channels], its last tap the
    present token's.

    Decoding: the cache is the tail, the last width - 1 inputs of each row before the convolution, zeros at the start.

    Knobs: width >= 1 tokens; bias, a learned offset a channel. Both start uniform in +-1 / sqrt(width).
    Refuses width < 1.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        channel_axes: tuple[str, ...],
        *,
        width: int = 4,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"ShortConv.width={width} must be at least 1 token; 4 is usual")
        self.channels, self.channel_axes, self.width = channels, channel_axes, width
        init = uniform(width**-0.5)
        self.kernel = axes.param(rngs, (width, *channels), ("taps", *channel_axes), init)
        self.bias = axes.param(rngs, channels, channel_axes, init) if bias else None

    def _sum(self, shifted: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
        """shifted[j]: the input j tokens back, [B, T, *channels]."""
        kernel = self.kernel[...].astype(jnp.float32)
        y = sum(kernel[self.width - 1 - j] * x.astype(jnp.float32) for j, x in enumerate(shifted))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(dtype)

    def __call__(self, x: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        """A whole row. Without segments each row is one document. Where a mesh cuts the length, a device gets the
        width - 1 tokens before its own from the one before it."""
        over, kept = axes.mesh_axes("length"), self.width - 1
        if not over or not kept:
            return self._sum([x, *_taps(x, segments_BT, kept, _nothing)], x.dtype)
        row, shape = ("batch", "length"), self.channel_axes
        arrays = {"x": x} if segments_BT is None else {"x": x, "segments_BT": segments_BT}
        cut = {"x": row + shape, "segments_BT": row}
        everywhere = tuple(dict.fromkeys(m for axis in row + shape for m in axes.mesh_axes(axis)))

        def local(arrays):
            _check_reach(kept, arrays["x"].shape[1], over)
            return _taps(arrays["x"], arrays.get("segments_BT"), kept, functools.partial(_from_before, over))

        specs = {name: cut[name] for name in arrays}
        taps = axes.shard_map(local, over=everywhere, inputs=(specs,), outputs=[row + shape] * kept)(arrays)
        return self._sum([x, *taps], x.dtype)

    def init_cache(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        """The empty tail, [B, width - 1, *channels]."""
        return jnp.zeros((batch, self.width - 1, *self.channels), dtype)

    def extend(self, x: jax.Array, tail: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """T further tokens a row, of which the first lengths_B are real; returns y and the new tail.

        The new tail ends at the last real token of each row: padding never enters it.
        """
        T, kept = x.shape[1], self.width - 1
        window = jnp.concatenate([tail.astype(x.dtype), x], 1)
        shifted = [window[:, kept - j : kept - j + T] for j in range(self.width)]
        index = lengths_B[:, None] + jnp.arange(kept)
        tail = jnp.take_along_axis(window, _expand(index, window), 1).astype(tail.dtype)
        return self._sum(shifted, x.dtype), tail

    def flops_per_token(self) -> float:
        """Multiply-adds of the taps, two FLOPs each."""
        return 2.0 * self.width * math.prod(self.channels)


def _expand(x_BT: jax.Array, like: jax.Array) -> jax.Array:
    """x_BT with trailing dimensions of 1, to go with the channels of `like`."""
    return jnp.reshape(x_BT, (*x_BT.shape, *(1,) * (like.ndim - 2)))


def _nothing(x: jax.Array, count: int) -> jax.Array:
    """The `count` values before a row: zeros."""
    return jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)


def _from_before(over: tuple[str, ...], x: jax.Array, count: int) -> jax.Array:
    """The last `count` values of the device before, zeros on the first."""
    size = jax.lax.axis_size(over)
    return jax.lax.ppermute(x[:, -count:], over, [(i, i + 1) for i in range(size - 1)])


def _taps(x: jax.Array, segments_BT: jax.Array | None, count: int, before: Callable) -> list[jax.Array]:
    """The values 1, 2, ... `count` tokens back, zeros where those are of another segment."""
    T, same_BT, out = x.shape[1], True, []
    window = jnp.concatenate([before(x, count), x], 1)
    if segments_BT is not None:
        segments_BS = jnp.concatenate([before(segments_BT, count), segments_BT], 1)
    for j in range(1, count + 1):
        back = window[:, count - j : count - j + T]
        if segments_BT is not None:
            # And, so that a tap never reaches over another segment to one of the same id (padding on both sides).
            same_BT = same_BT & (segments_BS[:, count - j : count - j + T] == segments_BT)
            back = jnp.where(_expand(same_BT, back), back, 0)
        out.append(back)
    return out


def _check_reach(count: int, length: int, over: tuple[str, ...]) -> None:
    if count > length:
        raise ValueError(
            f"ShortConv.width={count + 1} reaches over more than the {length} tokens that a device holds of a row: "
            f"make the mesh axis {', '.join(over)} smaller or the rows longer"
        )
