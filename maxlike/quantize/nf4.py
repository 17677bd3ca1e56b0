"""NF4 and FP4: sixteen values of a code book, scaled by the largest number of a block."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.errors import UserError
from maxlike.quantize.grid import Quantized

_FP4 = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
BOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sorted({sign * value / 12 for value in _FP4 for sign in (-1, 1)})),
}
DOUBLE = 256  # scales that share one of the second level


class NF4:
    """4-bit NormalFloat (QLoRA, arXiv 2305.14314): quantiles of a normal distribution, exact at 0 and at the ends.

    w_IO -> Quantized, whose codes index the book in ascending order. Blocks run along the inputs of one output (the
    row-major order of a matrix [outputs, inputs]).

    block: weights that share a float32 scale, their largest absolute value. double: these scales less their mean are
    stored in 8 bits, 256 to a block (signed, linear). book: "nf4", or "fp4" (also called bitsandbytes' default).
    Refuses a block that does not divide the matrix.
    """

    needs_hessian = False

    def __init__(self, *, block: int = 64, double: bool = False, book: Literal["nf4", "fp4"] = "nf4"):
        if block < 1:
            raise UserError(f"NF4.block={block} must be at least 1 weight")
        if book not in BOOKS:
            raise UserError(f"NF4.book={book!r} must be 'nf4' or 'fp4'")
        self.block, self.double = block, double
        self.values = np.asarray(BOOKS[book], np.float32)

    def check(self, inputs: int, outputs: int, layer: str) -> None:
        if inputs * outputs % self.block:
            raise UserError(f"a block of {self.block} weights does not divide the {inputs} x {outputs} of {layer}")

    def cost(self, inputs: int, outputs: int) -> float:
        """Bits a weight costs with its share of the scales."""
        return 4 + (8 + 32 / DOUBLE if self.double else 32) / self.block

    def __call__(self, w_IO: jax.Array, hessian: None = None) -> Quantized:
        inputs, outputs = w_IO.shape
        self.check(inputs, outputs, "this matrix")
        weight_IO, codes_IO, scales_N = _nearest(self, w_IO.astype(jnp.float32))
        return Quantized(weight_IO, codes_IO, scales_N[:, None], None, self.cost(inputs, outputs))


@functools.partial(jax.jit, static_argnums=0)
def _nearest(book: NF4, w_IO: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    w_Nb = jnp.reshape(w_IO.T, (-1, book.block))
    scales_N = jnp.max(jnp.abs(w_Nb), 1)
    scales_N = _eight_bits(scales_N) if book.double else scales_N
    boundaries = (book.values[1:] + book.values[:-1]) / 2
    codes_Nb = jnp.searchsorted(boundaries, w_Nb / jnp.where(scales_N > 0, scales_N, 1.0)[:, None])
    weight_Nb = jnp.asarray(book.values)[codes_Nb] * scales_N[:, None]
    outputs_first = w_IO.shape[::-1]
    return (
        jnp.reshape(weight_Nb, outputs_first).T,
        jnp.reshape(codes_Nb, outputs_first).T.astype(jnp.uint8),
        scales_N,
    )


def _eight_bits(scales_N: jax.Array) -> jax.Array:
    """Scales as 8 bits hold them: less their mean, in blocks of 256 with one scale each."""
    mean = jnp.mean(scales_N)
    padded = jnp.pad(scales_N - mean, (0, -len(scales_N) % DOUBLE))
    blocks = jnp.reshape(padded, (-1, DOUBLE))
    step = jnp.max(jnp.abs(blocks), 1, keepdims=True) / 127
    held = jnp.round(blocks / jnp.where(step > 0, step, 1.0)) * step
    # A scale that rounds to nothing, or below, would lose its block.
    return jnp.maximum(jnp.reshape(held, (-1,))[: len(scales_N)] + mean, 0.0)
