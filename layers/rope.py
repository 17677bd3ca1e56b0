"""Rotary position embedding, and the ways to stretch it over longer contexts."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

# Frequencies (radians a position, one for each rotated pair) and the factor on cos and sin, from the unscaled
# frequencies, the base and the number of rotated dimensions.
Scaling = Callable[[np.ndarray, float, int], tuple[np.ndarray, float]]


def _check_factor(owner: str, factor: float) -> None:
    if factor < 1:
        raise ValueError(f"{owner}.factor={factor} must be at least 1: it is new length / trained length")


def _check_length(owner: str, original_length: int) -> None:
    if original_length < 1:
        raise ValueError(f"{owner}.original_length={original_length} must be at least 1: it is the trained length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every frequency divided by `factor` >= 1."""

    factor: float

    def __post_init__(self):
        _check_factor("LinearScaling", self.factor)

    def __call__(self, frequencies: np.ndarray, base: float, dims: int) -> tuple[np.ndarray, float]:
        return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTKScaling:
    """NTK-aware base change: base' = base * factor^(dims / (dims - 2)), so that the slowest pair is interpolated by
    `factor` >= 1 and the fastest not at all (Peng et al. 2023, arXiv 2309.00071, section 3.1)."""

    factor: float

    def __post_init__(self):
        _check_factor("NTKScaling", self.factor)

    def __call__(self, frequencies: np.ndarray, base: float, dims: int) -> tuple[np.ndarray, float]:
        if dims <= 2:
            raise ValueError(f"NTKScaling needs more than 2 rotated dimensions, got {dims}: raise RoPE.fraction")
        return frequencies * self.factor ** (-np.arange(0, dims, 2) / (dims - 2)), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN:
    """NTK-by-parts interpolation with an attention factor (Peng et al. 2023, arXiv 2309.00071, sections 3.2 and 3.4).

    A pair that turns more than `beta_fast` times within `original_length` positions keeps its frequency, one that turns
    fewer than `beta_slow` times is divided by `factor`, with a linear ramp over the pair index between them. cos and
    sin are multiplied by `attention_factor`, by default 0.1 ln(factor) + 1; 1.0 gives NTK-by-parts alone.

    Knobs: factor >= 1; original_length >= 1, the trained length in tokens; beta_fast > beta_slow > 0 turns; truncate,
    whether the ends of the ramp are rounded outwards to whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_factor("YaRN", self.factor)
        _check_length("YaRN", self.original_length)
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"YaRN.beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow} > 0")

    def __call__(self, frequencies: np.ndarray, base: float, dims: int) -> tuple[np.ndarray, float]:
        def pair_that_turns(turns: float) -> float:
            return dims * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
        factor = 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp, factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Interpolation by wavelength (Llama 3.1, arXiv 2407.21783): pairs whose wavelength is below
    original_length / high_frequency_factor keep their frequency, above original_length / low_frequency_factor it is
    divided by `factor`, and the reciprocal wavelength blends the two between.

    Knobs: factor >= 1; original_length >= 1 in tokens; high_frequency_factor > low_frequency_factor > 0.
    """

    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self):
        _check_factor("Llama3Scaling", self.factor)
        _check_length("Llama3Scaling", self.original_length)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not high > low > 0:
            raise ValueError(f"Llama3Scaling.high_frequency_factor={high} must exceed low_frequency_factor={low} > 0")

    def __call__(self, frequencies: np.ndarray, base: float, dims: int) -> tuple[np.ndarray, float]:
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * keep + frequencies / self.factor * (1 - keep), 1.0


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array, layout: str) -> jax.Array:
    """Rotates the pairs of the first 2n numbers of each head by n angles; the rest passes through."""
    n = cos.shape[-1]
    rotated, rest = x[..., : 2 * n], x[..., 2 * n :]
    if layout == "half":
        a, b = rotated[..., :n], rotated[..., n:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
    a, b = rotated[..., 0::2], rotated[..., 1::2]
    rotated = jnp.reshape(jnp.stack([a * cos - b * sin, b * cos + a * sin], -1), rotated.shape)
    return jnp.concatenate([rotated, rest], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, layout: str) -> jax.Array:
    return _turn(x, cos, sin, layout)


def _rotate_forward(x, cos, sin, layout):
    return _turn(x, cos, sin, layout), (cos, sin)


def _rotate_backward(layout, residuals, gradient):
    # The transpose of a rotation is the rotation back: one pass that keeps nothing but the angles. An attention factor
    # lies in cos and sin alike, so it is right here too.
    cos, sin = residuals
    return _turn(gradient, cos, -sin, layout), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


@dataclasses.dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pair i of a head turns by position *
    base^(-2i/dims).

    Called with x [B, T, heads, head_dim] and positions_BT, returns x rotated, same shape and dtype; angles in float32.

    Knobs: base > 0; fraction in (0, 1] of head_dim that is rotated, the first dims = fraction * head_dim numbers, the
    rest passes through; layout: "half" pairs i with i + dims/2 (GPT-NeoX, Llama), "interleaved" pairs 2i with 2i + 1
    (GPT-J, the paper); scaling, a factory such as LinearScaling, NTKScaling, YaRN or Llama3Scaling, or None.
    Refuses a rotated width that is odd or zero.
    """

    head_dim: int
    _: dataclasses.KW_ONLY
    base: float = 10000.0
    fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: Callable | None = None

    def __post_init__(self):
        if self.base <= 0:
            raise ValueError(f"RoPE.base={self.base} must be positive, such as 10000")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE.fraction={self.fraction} is outside (0, 1]")
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"RoPE.layout={self.layout!r} must be 'half' or 'interleaved'")
        if self.dims == 0 or self.dims % 2:
            raise ValueError(
                f"RoPE.fraction={self.fraction} rotates {self.dims} of {self.head_dim}: make it even, above 0"
            )
        # The factory becomes the scaling itself, a value: modules that differ in nothing must compare equal.
        object.__setattr__(self, "scaling", None if self.scaling is None else self.scaling())

    @property
    def dims(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.head_dim * self.fraction)

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Radians a position of each pair, and the factor on cos and sin."""
        frequencies = self.base ** (-np.arange(0, self.dims, 2) / self.dims)
        return (frequencies, 1.0) if self.scaling is None else self.scaling(frequencies, self.base, self.dims)

    def __call__(self, x: jax.Array, positions_BT: jax.Array) -> jax.Array:
        frequencies, factor = self.frequencies()
        angle = positions_BT[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
        cos, sin = (jnp.cos(angle) * factor).astype(x.dtype), (jnp.sin(angle) * factor).astype(x.dtype)
        return _rotate(x, cos, sin, self.layout)


def rotary(owner: str, rope: Callable | None, head_dim: int) -> Any:
    """The rotary embedding of a mixer's heads, or None. Raises ValueError where the factory makes another thing."""
    if rope is None:
        return None
    try:
        return rope(head_dim)
    except TypeError as error:
        raise ValueError(
            f"{owner}.rope makes no rotary embedding of head_dim={head_dim} ({str(error).splitlines()[0]}): use RoPE "
            "or None; LRPE is for LightningAttention.lrpe alone"
        ) from error
