"""ImageTokenizer: pictures to ids and back, with a strictly local encoder and decoder (`image_convolutions.py` has the
convolutional ones).

Pictures are [B, S, S, 3] (batch, rows, columns, channels) in [-1, 1]; latents are [B, s, s, d], s = S / factor.
Encoders and decoders compute in the dtype of their parameters, whatever that of the pictures and the codes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers.linear import Linear
from layers.norm import RMSNorm

CHANNELS = 3


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pixels_BSSC", "ids", "aux"], meta_fields=[])
@dataclasses.dataclass
class Reconstruction:
    """pixels_BSSC: the decoded picture, not clipped to [-1, 1]; ids [B, s s] or [B, s s, books]; aux: the
    quantizer's, its loss under "loss"."""

    pixels_BSSC: jax.Array
    ids: jax.Array
    aux: dict[str, jax.Array]


class ImageTokenizer(nnx.Module):
    """Encoder, quantizer, decoder: a picture becomes (size / factor)^2 ids below `vocab`, row by row.

    Knobs: size S: pixels a side; factor f >= 1: pixels a side that one id stands for; quantizer: factory, see
    `quantizers.py`; encoder, decoder: factories, called with (factor, code width): [B, S, S, 3] -> [B, s, s, d] and
    back.
    Refuses a size that the factor does not divide, and a length of rows other than its number of ids.
    """

    def __init__(
        self, *, size: int, factor: int, quantizer: Callable, encoder: Callable, decoder: Callable, rngs: nnx.Rngs
    ):
        if factor < 1 or size < 1 or size % factor:
            raise ValueError(f"ImageTokenizer.factor={factor} must divide size={size}")
        self.size, self.factor, self.side = size, factor, size // factor
        self.quantizer = quantizer(rngs=rngs)
        self.vocab = self.quantizer.vocab_size
        self.encoder = encoder(factor, self.quantizer.dim, rngs=rngs)
        self.decoder = decoder(factor, self.quantizer.dim, rngs=rngs)

    @property
    def length(self) -> int:
        """Positions of a picture's ids."""
        return self.side**2

    def _flat(self, ids: jax.Array) -> jax.Array:
        return ids.reshape(ids.shape[0], self.length, *ids.shape[3:])

    def __call__(self, pixels_BSSC: jax.Array, key: jax.Array | None = None) -> Reconstruction:
        """key: randomness of a training call (restarts, dropout of books), or None."""
        zq, ids, aux = self.quantizer(self._encoded(pixels_BSSC), key)
        return Reconstruction(self.decoder(zq), self._flat(ids), aux)

    def _encoded(self, pixels_BSSC: jax.Array) -> jax.Array:
        if pixels_BSSC.shape[1:] != (self.size, self.size, CHANNELS):
            raise ValueError(
                f"ImageTokenizer.size={self.size} takes pictures of [{self.size}, {self.size}, {CHANNELS}], "
                f"not {list(pixels_BSSC.shape[1:])}: set it to the data's size"
            )
        return self.encoder(pixels_BSSC)

    def encode(self, pixels_BSSC: jax.Array) -> jax.Array:
        """The ids of pictures, int32 [B, length] or [B, length, books]."""
        return self._flat(self.quantizer(self._encoded(pixels_BSSC))[1])

    def decode(self, ids: jax.Array) -> jax.Array:
        """The pictures of ids [B, S, S, 3]; one with an id outside the vocabulary is NaN there."""
        ids = ids.reshape(ids.shape[0], self.side, self.side, *ids.shape[2:])
        return self.decoder(self.quantizer.ids_to_codes(ids))

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Refuses: pictures are not made id by id here."""
        raise ValueError("ImageTokenizer generates nothing: a language model over its ids does")

    def flops_per_token(self, length: int) -> float:
        """Training FLOPs an id: three times the matrix products of encoder and decoder; the quantizer counts nothing.
        Refuses a length that is not a picture's number of ids."""
        if length != self.length:
            raise ValueError(
                f"ImageTokenizer makes {self.length} ids a picture (size={self.size}, factor={self.factor}), and the "
                f"sequence length is {length}: make them equal"
            )
        return 3.0 * (self.encoder.flops_per_token() + self.decoder.flops_per_token())


def to_patches(pixels_BSSC: jax.Array, factor: int) -> jax.Array:
    """[B, S, S, C] -> [B, S / factor, S / factor, factor^2 C]."""
    B, S, _, C = pixels_BSSC.shape
    s = S // factor
    return pixels_BSSC.reshape(B, s, factor, s, factor, C).swapaxes(2, 3).reshape(B, s, s, factor**2 * C)


def from_patches(patches: jax.Array, factor: int) -> jax.Array:
    """The inverse of `to_patches`."""
    B, s, _, P = patches.shape
    C = P // factor**2
    return patches.reshape(B, s, s, factor, factor, C).swapaxes(2, 3).reshape(B, s * factor, s * factor, C)


def _check(owner: str, width: int, depth: int) -> None:
    if width < 1 or depth < 0:
        raise ValueError(f"{owner}.width={width} must be at least 1 and depth={depth} not negative")


class PatchEncoder(nnx.Module):
    """Strictly local: each patch of factor x factor pixels by itself through a linear map and `depth` SiLU layers to a
    code vector. The vector is made from a normalised one, so its entries begin with unit variance.

    Knobs: width of the layers >= 1; depth >= 0.
    """

    def __init__(self, factor: int, dim: int, *, width: int, depth: int = 2, rngs: nnx.Rngs):
        _check("PatchEncoder", width, depth)
        self.factor = factor
        self.embed = Linear((factor**2 * CHANNELS,), (width,), ("patch",), ("embed",), bias=True, rngs=rngs)
        self.layers = nnx.List([_square(width, rngs) for _ in range(depth)])
        self.norm = RMSNorm(width, gain="none", rngs=rngs)
        self.code = Linear((width,), (dim,), ("embed",), ("code",), bias=True, rngs=rngs)

    def __call__(self, pixels_BSSC: jax.Array) -> jax.Array:
        h = self.embed(to_patches(pixels_BSSC, self.factor).astype(self.embed.kernel.dtype))
        for layer in self.layers:
            h = layer(jax.nn.silu(h))
        return self.code(self.norm(h))

    def flops_per_token(self) -> float:
        return sum(part.flops_per_token() for part in (self.embed, *self.layers, self.code))


class PatchDecoder(nnx.Module):
    """The mirror image of PatchEncoder. Knobs: as there."""

    def __init__(self, factor: int, dim: int, *, width: int, depth: int = 2, rngs: nnx.Rngs):
        _check("PatchDecoder", width, depth)
        self.factor = factor
        self.embed = Linear((dim,), (width,), ("code",), ("embed",), bias=True, rngs=rngs)
        self.layers = nnx.List([_square(width, rngs) for _ in range(depth)])
        self.pixels = Linear((width,), (factor**2 * CHANNELS,), ("embed",), ("patch",), bias=True, rngs=rngs)

    def __call__(self, zq: jax.Array) -> jax.Array:
        h = self.embed(zq.astype(self.embed.kernel.dtype))
        for layer in self.layers:
            h = layer(jax.nn.silu(h))
        return from_patches(self.pixels(jax.nn.silu(h)), self.factor)

    def flops_per_token(self) -> float:
        return sum(part.flops_per_token() for part in (self.embed, *self.layers, self.pixels))


def _square(width: int, rngs: nnx.Rngs) -> Linear:
    return Linear((width,), (width,), ("embed",), ("embed_out",), bias=True, rngs=rngs)
