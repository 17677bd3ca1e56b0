"""Quantizers without a codebook: each vector becomes an id by arithmetic (FSQ, LFQ, BSQ).

One interface for these and for those of `codebooks.py`, all in float32 inside, whatever the compute dtype:

    dim            width d of the vectors
    vocab_size     ids are below it; `books` ids a vector (1 but for residual quantizers, whose ids have a last axis M)
    (z, key)   ->  (zq straight-through [..., d], ids int32 [...], aux): key is randomness of a training call or None;
                   aux["loss"] where the quantizer has a loss of its own
    ids_to_codes   ids -> [..., d], what zq is for them; an id outside the vocabulary gives NaN
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Quantized = tuple[jax.Array, jax.Array, dict[str, jax.Array]]
MOST_IDS = 2**31 - 1
FSQ_SLACK = 1e-3  # the outermost levels are reached, not only approached


def straight_through(z: jax.Array, zq: jax.Array) -> jax.Array:
    """zq in the forward pass, with the gradient of z."""
    return z + jax.lax.stop_gradient(zq - z)


class FSQ(nnx.Module):
    """Finite scalar quantization (arXiv 2309.15505): each dimension is bounded by tanh and rounded to L_i levels.

    z: [..., d], d = len(levels). half = (L - 1)(1 + 1e-3) / 2, off = 1/2 for an even L, else 0; b = half tanh(z +
    atanh(off / half)) - off; zq = round(b) / (L // 2), in [-1, 1]; id = sum_i (round(b_i) + L_i // 2) prod_{j<i} L_j.
    This is the published library's convention (the paper's listing has 1 - 1e-3 and tan: the same codes, but 0.9 % of
    inputs fall on the other side of a boundary). No parameters and no loss.

    Knobs: levels: tuple of integers >= 3, whose product is the vocabulary: (8, 6, 5) 240, (8, 5, 5, 5) 1000, (7, 5, 5,
    5, 5) 4375, (8, 8, 8, 6, 5) 15360, (8, 8, 8, 5, 5, 5) 64000.
    Refuses a level below 3 and more than 2^31 - 1 ids.
    """

    books = 1

    def __init__(self, *, levels: tuple[int, ...], rngs: nnx.Rngs):
        if not levels or any(not isinstance(level, int) or level < 3 for level in levels):
            raise ValueError(f"FSQ.levels={levels} must be integers of at least 3, such as (8, 5, 5, 5)")
        if math.prod(levels) > MOST_IDS:
            raise ValueError(f"FSQ.levels={levels} make more than 2^31 - 1 ids: take fewer or smaller ones")
        self.levels, self.dim, self.vocab_size = tuple(levels), len(levels), math.prod(levels)

    def _constants(self):
        L = jnp.array(self.levels, jnp.float32)
        strides = jnp.array([math.prod(self.levels[:i]) for i in range(self.dim)], jnp.int32)
        return L, jnp.floor(L / 2), strides

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        L, middle, strides = self._constants()
        half = (L - 1) * (1 + FSQ_SLACK) / 2
        off = jnp.where(L % 2 == 0, 0.5, 0.0)
        bounded = half * jnp.tanh(z.astype(jnp.float32) + jnp.arctanh(off / half)) - off
        rounded = jnp.round(bounded)
        ids = jnp.sum((rounded + middle).astype(jnp.int32) * strides, -1)
        return (straight_through(bounded, rounded) / middle).astype(z.dtype), ids, {}

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        L, middle, strides = self._constants()
        digits = ids[..., None] // strides % L.astype(jnp.int32)
        return _or_nan((digits - middle) / middle, ids, self.vocab_size)


class _SignBits(nnx.Module):
    """What LFQ and BSQ share: the code is the signs of n numbers, each 1 / scale in size; knobs as in LFQ."""

    books = 1

    def __init__(
        self,
        scale: float,
        bits: int,
        entropy_weight: float,
        diversity: float,
        commitment: float,
        inverse_temperature: float,
    ):
        self.scale, self.dim, self.vocab_size = scale, bits, 2**bits
        self.entropy_weight, self.diversity, self.commitment = entropy_weight, diversity, commitment
        self.inverse_temperature = inverse_temperature

    def _quantize(self, u: jax.Array, dtype: jnp.dtype) -> Quantized:
        """Of float32 numbers u [..., n]; zq in `dtype`."""
        q = jnp.where(u > 0, 1.0, -1.0) / self.scale
        sample, mean = bit_entropies(4 * self.inverse_temperature * self.scale * u)
        loss = self.entropy_weight * (sample - self.diversity * mean)
        loss = loss + self.commitment * jnp.mean(jnp.square(u - q))
        return straight_through(u, q).astype(dtype), _bits_to_ids(u > 0), {"loss": loss}

    def ids_to_codes(self, ids: jax.Array) -> jax.Array:
        return _or_nan(_signs(ids, self.dim) / self.scale, ids, self.vocab_size)


class LFQ(_SignBits):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): the signs of n numbers are the bits of the id.

    z: [..., n]; zq = +1 where z > 0, else -1; the first dimension is the most significant bit. loss = entropy_weight
    (E[H(p)] - diversity H(E[p])) + commitment mean (z - zq)^2, where p is over the 2^n codes; as p is a product over
    bits, both entropies are sums over bits (the second an upper bound of the joint one).

    Knobs: bits n in 1..30; entropy_weight >= 0; diversity >= 0 weighs the entropy of the mean; commitment >= 0;
    inverse_temperature > 0 of p: a bit is 1 with probability sigmoid(4 inverse_temperature z).
    """

    def __init__(
        self,
        *,
        bits: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment: float = 0.25,
        inverse_temperature: float = 100.0,
        rngs: nnx.Rngs,
    ):
        _check_bits("LFQ", bits, entropy_weight, diversity, commitment, inverse_temperature)
        super().__init__(1.0, bits, entropy_weight, diversity, commitment, inverse_temperature)

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        return self._quantize(z.astype(jnp.float32), z.dtype)


class BSQ(_SignBits):
    """Binary spherical quantization (arXiv 2406.07548): LFQ on the unit sphere.

    z: [..., n]; u = z / |z|; zq = sign(u) / sqrt(n), also of length 1. The entropy loss is LFQ's, of u sqrt(n); with
    the sphere bounded it needs no commitment.

    Knobs: as LFQ.
    """

    def __init__(
        self,
        *,
        bits: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        commitment: float = 0.0,
        inverse_temperature: float = 1.0,
        rngs: nnx.Rngs,
    ):
        _check_bits("BSQ", bits, entropy_weight, diversity, commitment, inverse_temperature)
        super().__init__(math.sqrt(bits), bits, entropy_weight, diversity, commitment, inverse_temperature)

    def __call__(self, z: jax.Array, key: jax.Array | None = None) -> Quantized:
        return self._quantize(unit(z.astype(jnp.float32)), z.dtype)


def unit(z: jax.Array) -> jax.Array:
    """z / |z| over the last axis, with a finite gradient at 0."""
    return z * jax.lax.rsqrt(jnp.sum(jnp.square(z), -1, keepdims=True) + 1e-12)


def bit_entropies(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over vectors of the entropy, entropy of the mean) of independent bits with these logits [..., n], in nats,
    summed over bits. Formed from softplus, because log(p + small) overflows in the gradient."""
    p = jax.nn.sigmoid(logits)
    sample = jnp.mean(jnp.sum(jax.nn.softplus(logits) - p * logits, -1))
    mean = jnp.clip(jnp.mean(p, tuple(range(p.ndim - 1))), 1e-6, 1 - 1e-6)
    return sample, -jnp.sum(mean * jnp.log(mean) + (1 - mean) * jnp.log1p(-mean))


def _check_bits(owner: str, bits: int, entropy: float, diversity: float, commitment: float, temperature: float):
    if not 1 <= bits <= 30:
        raise ValueError(f"{owner}.bits={bits} must lie between 1 and 30; the vocabulary is 2^bits")
    for name, value in (("entropy_weight", entropy), ("diversity", diversity), ("commitment", commitment)):
        if value < 0:
            raise ValueError(f"{owner}.{name}={value} must not be negative; 0 switches it off")
    if temperature <= 0:
        raise ValueError(f"{owner}.inverse_temperature={temperature} must be positive")


def _bits_to_ids(bits: jax.Array) -> jax.Array:
    places = 2 ** jnp.arange(bits.shape[-1] - 1, -1, -1, dtype=jnp.int32)
    return jnp.sum(bits.astype(jnp.int32) * places, -1)


def _signs(ids: jax.Array, bits: int) -> jax.Array:
    places = jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
    return (ids[..., None] >> places & 1) * 2.0 - 1.0


def _or_nan(codes: jax.Array, ids: jax.Array, vocab_size: int) -> jax.Array:
    return jnp.where(((ids >= 0) & (ids < vocab_size))[..., None], codes, jnp.nan)
