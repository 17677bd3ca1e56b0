"""Convolutional encoder and decoder of pictures: a small VQGAN (arXiv 2012.09841) without attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.image_tokenizer import CHANNELS

KERNEL = 3
SMALL = 64  # below this many channels a group norm has 8 groups instead of 32


class Convolution(nnx.Module):
    """A 3 x 3 convolution [B, H, W, inputs] -> [B, H / stride, W / stride, outputs] with offset, "same" padding.

    The kernel's axes are ("taps", input_axis, output_axis). Computes in the kernel's dtype.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        input_axis: str = "embed",
        output_axis: str = "embed_out",
        *,
        stride: int = 1,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        init = axes.normal((KERNEL**2 * inputs) ** -0.5)
        self.kernel = axes.param(rngs, (KERNEL**2, inputs, outputs), ("taps", input_axis, output_axis), init)
        self.bias = axes.param(rngs, (outputs,), (output_axis,), jax.nn.initializers.zeros)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        kernel = self.kernel[...].reshape(KERNEL, KERNEL, self.inputs, self.outputs)
        strides = (self.stride, self.stride)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x_BHWC.astype(kernel.dtype), kernel, strides, "SAME", dimension_numbers=layout)
        return y + self.bias[...]

    def flops(self) -> float:
        """Of one output pixel."""
        return 2.0 * KERNEL**2 * self.inputs * self.outputs


class GroupNorm(nnx.Module):
    """Normalises each of 32 groups of channels (8 below 64; the greatest common divisor with the channels where they do
    not divide) of a picture [B, H, W, C] (arXiv 1803.08494)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.groups = math.gcd(channels, 8 if channels < SMALL else 32)
        self.gain = axes.param(rngs, (channels,), ("norm",), jax.nn.initializers.ones)
        self.bias = axes.param(rngs, (channels,), ("norm",), jax.nn.initializers.zeros)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        B, H, W, C = x_BHWC.shape
        x = x_BHWC.astype(jnp.float32).reshape(B, H * W, self.groups, C // self.groups)
        x = x - jnp.mean(x, (1, 3), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), (1, 3), keepdims=True) + 1e-6)
        y = x.reshape(B, H, W, C) * self.gain[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x_BHWC.dtype)


class Residual(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))) at one width."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([GroupNorm(channels, rngs=rngs) for _ in range(2)])
        self.convolutions = nnx.List([Convolution(channels, channels, rngs=rngs) for _ in range(2)])

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        h = x_BHWC
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = convolution(jax.nn.silu(norm(h)))
        return x_BHWC + h

    def flops(self) -> float:
        """Of one pixel."""
        return sum(convolution.flops() for convolution in self.convolutions)


def _widths(owner: str, factor: int, width: int, multiples: tuple[int, ...]) -> list[int]:
    """Channels of the stages, from the finest on: one for each halving."""
    stages = factor.bit_length() - 1
    if factor < 2 or factor != 1 << stages:
        raise ValueError(f"{owner}: the factor {factor} must be a power of two from 2 on: each stage halves a side")
    if width < 1 or not multiples or min(multiples) < 1:
        raise ValueError(f"{owner}.width={width} and multiples={multiples} must be at least 1")
    return [width * multiples[min(stage, len(multiples) - 1)] for stage in range(stages)]


class ConvEncoder(nnx.Module):
    """Stem, then for each halving two residual blocks and a convolution of stride 2, then norm and the code.

    Knobs: width: channels of the finest stage; multiples: of it, stage by stage; the last one holds for all further
    stages. Refuses a factor that is no power of two.
    """

    def __init__(
        self, factor: int, dim: int, *, width: int = 64, multiples: tuple[int, ...] = (1, 2, 4), rngs: nnx.Rngs
    ):
        widths = _widths("ConvEncoder", factor, width, multiples)
        self.factor = factor
        self.stem = Convolution(CHANNELS, widths[0], "patch", "embed_out", rngs=rngs)
        self.blocks = nnx.List([Residual(w, rngs=rngs) for w in widths for _ in range(2)])
        self.down = nnx.List(
            [Convolution(w, after, stride=2, rngs=rngs) for w, after in zip(widths, [*widths[1:], widths[-1]])]
        )
        self.norm = GroupNorm(widths[-1], rngs=rngs)
        self.code = Convolution(widths[-1], dim, "embed", "code", rngs=rngs)

    def __call__(self, pixels_BSSC: jax.Array) -> jax.Array:
        h = self.stem(pixels_BSSC)
        for stage, down in enumerate(self.down):
            h = down(self.blocks[2 * stage + 1](self.blocks[2 * stage](h)))
        return self.code(self.norm(h))

    def flops_per_token(self) -> float:
        fine, coarse = _pixels(self.factor, len(self.down))
        total = self.stem.flops() * fine[0] + self.code.flops()
        total += sum(block.flops() * fine[i // 2] for i, block in enumerate(self.blocks))
        return total + sum(convolution.flops() * n for convolution, n in zip(self.down, coarse, strict=True))


class ConvDecoder(nnx.Module):
    """The mirror image of ConvEncoder: each doubling repeats pixels, then a convolution and two residual blocks.

    Knobs: as ConvEncoder.
    """

    def __init__(
        self, factor: int, dim: int, *, width: int = 64, multiples: tuple[int, ...] = (1, 2, 4), rngs: nnx.Rngs
    ):
        widths = _widths("ConvDecoder", factor, width, multiples)
        self.factor = factor
        self.code = Convolution(dim, widths[-1], "code", "embed", rngs=rngs)
        self.up = nnx.List([Convolution(after, w, rngs=rngs) for w, after in zip(widths, [*widths[1:], widths[-1]])])
        self.blocks = nnx.List([Residual(w, rngs=rngs) for w in widths for _ in range(2)])
        self.norm = GroupNorm(widths[0], rngs=rngs)
        self.pixels = Convolution(widths[0], CHANNELS, "embed", "patch", rngs=rngs)

    def __call__(self, zq: jax.Array) -> jax.Array:
        h = self.code(zq)
        for stage in reversed(range(len(self.up))):
            h = self.up[stage](jnp.repeat(jnp.repeat(h, 2, 1), 2, 2))
            h = self.blocks[2 * stage + 1](self.blocks[2 * stage](h))
        return self.pixels(jax.nn.silu(self.norm(h)))

    def flops_per_token(self) -> float:
        fine, _ = _pixels(self.factor, len(self.up))
        total = self.pixels.flops() * fine[0] + self.code.flops()
        total += sum(block.flops() * fine[i // 2] for i, block in enumerate(self.blocks))
        return total + sum(convolution.flops() * n for convolution, n in zip(self.up, fine, strict=True))


def _pixels(factor: int, stages: int) -> tuple[list[int], list[int]]:
    """Pixels an id before and after the halving of each stage."""
    fine = [(factor >> stage) ** 2 for stage in range(stages)]
    return fine, [n // 4 for n in fine]
