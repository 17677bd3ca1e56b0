"""Hadamard matrices and the rotations made of them."""

import numpy as np
import pytest

from maxlike.errors import UserError
from maxlike.quantize.hadamard import Rotation, divisor, hadamard


@pytest.mark.parametrize("n", [1, 2, 16, 12, 20, 28, 36, 44, 60, 108, 140, 24, 40, 384, 160])
def test_rows_are_orthogonal(n):
    h = hadamard(n)
    assert set(np.unique(h)) <= {-1, 1} and np.array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [0, 3, 6, 52, 172, 344])
def test_a_size_without_a_construction_is_refused(n):
    with pytest.raises(UserError, match=f"size {n}"):
        hadamard(n)


@pytest.mark.parametrize(("size", "block", "seed"), [(64, None, None), (96, None, 0), (344, 8, 3), (48, 12, None)])
def test_a_rotation_is_orthonormal_along_any_axis(size, block, seed):
    rotation = Rotation(size, block=block, seed=seed)
    dense = np.asarray(rotation(np.eye(size, dtype=np.float32)))
    np.testing.assert_allclose(dense @ dense.T, np.eye(size), atol=1e-6)
    x = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)
    np.testing.assert_allclose(rotation(x, 0), dense.T @ x, atol=1e-5)
    np.testing.assert_allclose(rotation.inverse(rotation(x, 0), 0), x, atol=1e-5)
    count = size // (block or size)
    if count == 1 and seed is None:
        np.testing.assert_allclose(dense * np.sqrt(size), hadamard(size), atol=1e-5)
    for i in range(count):  # nothing leaves its block
        rows = slice(i * (block or size), (i + 1) * (block or size))
        assert not np.any(np.delete(dense[rows], np.arange(size)[rows], axis=1))


def test_an_outlier_is_spread_over_all_channels():
    x = np.zeros(64, np.float32)
    x[17] = 8
    np.testing.assert_allclose(np.abs(Rotation(64, seed=1)(x)), 1, atol=1e-6)


def test_blocks():
    assert (divisor(344), divisor(5504), divisor(43)) == (8, 128, 1)
    with pytest.raises(UserError, match="block of 7"):
        Rotation(64, block=7)
