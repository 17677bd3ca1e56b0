"""The grid of a weight quantizer: which few values the numbers of a group are rounded to."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from maxlike.errors import UserError

BITS = (2, 3, 4, 6, 8, 16)
STEPS = 80  # of the clip search: the range shrunk by 0, 1, ..., 79 %
NORM = 2.4  # the search minimises sum |error|^NORM


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    weight_IO: float32, what the codes stand for. codes_IO: int8 or uint8. scales_GO and zeros_GO: of each group of
    inputs and output, weight = scale (code - zero); zeros None where codes index a code book. bits: a weight costs,
    scales included. damp: the share of the mean diagonal that a Hessian was damped with, None without one.
    """

    weight_IO: jax.Array
    codes_IO: jax.Array
    scales_GO: jax.Array
    zeros_GO: jax.Array | None
    bits: float
    damp: float | None = None


def check_bits(name: str, bits: int, known: tuple[int, ...] = BITS) -> None:
    """Raises UserError for a number of bits that nothing is quantized to here."""
    if bits not in known:
        raise UserError(f"{name}={bits} must be one of {', '.join(map(str, known))} bits")


class Grid:
    """2^bits equally spaced values for each group of inputs and each output, 0 among them.

    levels: "symmetric", codes in [-2^(b-1), 2^(b-1) - 1], scale max|w| / (2^(b-1) - 1) (QuaRot, arXiv 2404.00456, and
        outlier-safe pre-training, arXiv 2506.19697); "asymmetric", codes in [0, 2^b - 1] over [min(w, 0), max(w, 0)];
        "half_step", the symmetric grid of GPTQ (arXiv 2210.17323): 2^b values over [-max|w|, max|w|], asymmetric
        around 0 by half a step.
    bits: 2, 3, 4, 6 or 8. group: inputs that share a scale, None for all of them.
    search: shrink the range by 0 to 79 % and keep what gives the least sum of |error|^2.4.
    Rounding is half to even. A group of zeros stays zero.
    Refuses other bits and a group that does not divide the inputs.
    """

    def __init__(
        self,
        *,
        bits: int,
        levels: Literal["symmetric", "asymmetric", "half_step"] = "symmetric",
        group: int | None = None,
        search: bool = True,
    ):
        check_bits("Grid.bits", bits, BITS[:-1])
        if levels not in ("symmetric", "asymmetric", "half_step"):
            raise UserError(f"Grid.levels={levels!r} must be 'symmetric', 'asymmetric' or 'half_step'")
        if group is not None and group < 1:
            raise UserError(f"Grid.group={group} must be at least 1 input, or None for all that an output has")
        self.bits, self.levels, self.group, self.search = bits, levels, group, search
        self.code_dtype = jnp.int8 if levels == "symmetric" else jnp.uint8
        self.lowest, self.highest = (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if levels == "symmetric" else (0, 2**bits - 1)
        )

    def check(self, inputs: int, layer: str) -> None:
        """Raises UserError, naming the layer, where the group does not divide its inputs."""
        if self.group is not None and inputs % self.group:
            raise UserError(
                f"a group of {self.group} inputs does not divide the {inputs} of {layer}: take a divisor of them, or "
                "none (all inputs of an output share one scale)"
            )

    def cost(self, inputs: int) -> float:
        """Bits a weight costs: its code, and its share of a 16-bit scale and, if asymmetric, 16-bit zero point."""
        return self.bits + (32 if self.levels == "asymmetric" else 16) / (self.group or inputs)

    def fit(self, w_gO: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scale, zero) [..., O] of groups [..., g, O], float32."""
        low, high = self._range(w_gO)
        first = self._spacing(low, high)
        if not self.search:
            return first

        def attempt(best, share):
            scale, zero = self._spacing(share * low, share * high)
            error = jnp.sum(jnp.abs(self.round(w_gO, scale, zero)[0] - w_gO) ** NORM, -2)
            better = error < best[0]
            found = jax.tree.map(lambda new, old: jnp.where(better, new, old), (error, scale, zero), best)
            return found, None

        shares = 1 - jnp.arange(STEPS) / 100
        start = (jnp.full(first[0].shape, jnp.inf), *first)
        return jax.lax.scan(attempt, start, shares)[0][1:]

    def round(self, w_gO: jax.Array, scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(dequantized, codes) of groups [..., g, O] on a grid (scale, zero) [..., O]."""
        scale, zero = scale[..., None, :], zero[..., None, :]
        codes = jnp.clip(jnp.round(w_gO / scale) + zero, self.lowest, self.highest)
        return scale * (codes - zero), codes

    def _range(self, w_gO: jax.Array) -> tuple[jax.Array, jax.Array]:
        low, high = jnp.minimum(jnp.min(w_gO, -2), 0.0), jnp.maximum(jnp.max(w_gO, -2), 0.0)
        if self.levels != "asymmetric":
            high = jnp.maximum(-low, high)
            low = -high
        empty = high == low
        return jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)

    def _spacing(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.levels == "symmetric":
            return high / self.highest, jnp.zeros_like(high)
        scale = (high - low) / self.highest
        zero = jnp.round(-low / scale) if self.levels == "asymmetric" else jnp.full_like(scale, 2.0 ** (self.bits - 1))
        return scale, zero
