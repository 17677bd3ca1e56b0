"""Hadamard rotations: orthonormal matrices of entries +-1 / sqrt(n) that spread an outlier over all channels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from maxlike.errors import UserError


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(n: int) -> np.ndarray | None:
    """A Hadamard matrix of order n by one of Paley's two constructions (1933) over a prime field, or None."""
    for q, kind in ((n - 1, 3), (n // 2 - 1, 1)):
        if not _is_prime(q) or q % 4 != kind or (kind == 1 and n % 2):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
        i = np.arange(q)
        core = np.ones((q + 1, q + 1), int)
        core[0, 0] = 0
        core[1:, 1:] = character[(i[:, None] - i[None, :]) % q]
        if kind == 3:
            core[1:, 0] = -1
            return core + np.eye(q + 1, dtype=int)
        return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])
    return None


@functools.cache
def _factors(n: int) -> tuple[int, int] | None:
    """(K, m) with n = K 2^m, K = 1 or the order of a Paley matrix, m as large as can be; None where there is none."""
    m = (n & -n).bit_length() - 1
    for power in range(m, -1, -1):
        K = n >> power
        if K == 1 or _paley(K) is not None:
            return K, power
    return None


def hadamard(n: int) -> np.ndarray:
    """A matrix of entries +-1 with H H^T = n I, n = K 2^m with K = 1 or the order of a Paley matrix over a prime field:
    12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 140, ...

    Raises UserError for any other n (among them 52, 156 and 172, which need further constructions).
    """
    found = None if n < 1 else _factors(n)
    if found is None:
        raise UserError(
            f"there is no construction here of a Hadamard matrix of size {n}: choose a width K 2^m with K one of 1, "
            "12, 20, 28, 36, 44, 60, or rotate blocks of it (--hadamard_blocks)"
        )
    K, m = found
    matrix = np.ones((1, 1), int) if K == 1 else _paley(K)
    for _ in range(m):
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix


class Rotation:
    """x A of row vectors x, A = diag(signs) (I kron H), orthonormal: H a Hadamard matrix over blocks of the channels.

    size: channels. block: channels of a block, None for all of them. seed: of random signs (a random Hadamard matrix,
    QuaRot, arXiv 2404.00456), None for none. It costs size * (a + b) multiply-adds a vector, with a b = block.
    Refuses a block that does not divide the size, or whose order has no construction here.
    """

    def __init__(self, size: int, *, block: int | None = None, seed: int | None = None):
        block = size if block is None else block
        if size % block:
            raise UserError(f"a Hadamard block of {block} channels does not divide {size}")
        hadamard(block)  # refuses
        K, m = _factors(block)
        self.size, self.block = size, block
        left, right = K << (m // 2), 1 << (m - m // 2)
        self._left, self._right = (
            hadamard(n).astype(np.float32) / np.sqrt(n).astype(np.float32) for n in (left, right)
        )
        signs = np.ones(size) if seed is None else np.random.default_rng(seed).choice([-1.0, 1.0], size)
        self._signs = signs.astype(np.float32)

    def __call__(self, x: jax.Array, axis: int = -1) -> jax.Array:
        """x A along an axis, in float32."""
        x = jnp.moveaxis(x.astype(jnp.float32), axis, -1) * self._signs
        return jnp.moveaxis(self._product(x, self._left, self._right), -1, axis)

    def inverse(self, x: jax.Array, axis: int = -1) -> jax.Array:
        """x A^T along an axis, in float32."""
        x = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
        return jnp.moveaxis(self._product(x, self._left.T, self._right.T) * self._signs, -1, axis)

    def _product(self, x: jax.Array, left: np.ndarray, right: np.ndarray) -> jax.Array:
        parts = jnp.reshape(x, (*x.shape[:-1], -1, len(left), len(right)))
        # Full precision: rounding the rotation itself would be an error that quantization is not to blame for.
        y = jnp.einsum("...ab,ac,bd->...cd", parts, left, right, precision=jax.lax.Precision.HIGHEST)
        return jnp.reshape(y, x.shape)


@functools.cache
def rotation(size: int, block: int | None = None, seed: int | None = None) -> Rotation:
    """The Rotation of these knobs, made once."""
    return Rotation(size, block=block, seed=seed)


def divisor(size: int) -> int:
    """The largest power of two that divides a size: blocks for one that has no Hadamard matrix here."""
    return size & -size
