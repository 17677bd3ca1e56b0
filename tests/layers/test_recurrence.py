"""The chunked recurrence against the token-by-token one."""

import functools

import jax
import numpy as np
import pytest

from layers import kernels
from layers.recurrence import recurrence
from tests.reference import recurrence as naive

B, T, H, N, K = 2, 37, 4, 6, 5
# decay by kind, whether the delta rule, groups of queries and keys
KINDS = {
    "none": ("none", False, 4),
    "constant": ("constant", False, 4),
    "constant_grouped": ("constant", False, 2),
    "token": ("token", False, 4),
    "token_one_group": ("token", False, 1),
    "channel": ("channel", False, 4),
    "channel_grouped": ("channel", False, 2),
    "delta": ("none", True, 4),
    "gated_delta": ("token", True, 4),
    "gated_delta_grouped": ("token", True, 2),
}
kind = pytest.mark.parametrize("name", KINDS)


def inputs(name: str, length: int = T, seed: int = 0, strength: float = 0.5) -> dict:
    decay, delta, groups = KINDS[name]
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((B, length, groups, N)) for _ in range(2))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    shape = {"none": None, "constant": (H,), "token": (B, length, H), "channel": (B, length, H, N)}[decay]
    x = {
        "q": q,
        "k": k,
        "v": rng.standard_normal((B, length, H, K)),
        "log_decay": None if shape is None else -strength * rng.exponential(size=shape),
        "beta": rng.uniform(0, 1, (B, length, H)) if delta else None,
        "initial": rng.standard_normal((B, H, N, K)),
    }
    return {name: None if z is None else z.astype(np.float32) for name, z in x.items()}


@functools.partial(jax.jit, static_argnames="chunk")
def run(x: dict, segments=None, real=None, *, chunk: int):
    return recurrence(
        x["q"],
        x["k"],
        x["v"],
        log_decay=x["log_decay"],
        beta_BTH=x["beta"],
        initial_BHNK=x["initial"],
        segments_BT=segments,
        real_BT=real,
        chunk=chunk,
    )


def close(got, expected, atol=2e-5):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, atol=atol * max(1.0, float(np.abs(e).max())))


@kind
@pytest.mark.parametrize("chunk", [1, 7, 16, T, 2 * T])
def test_every_chunk_length_equals_the_naive_recurrence(name, chunk):
    x = inputs(name)
    close(run(x, chunk=chunk), naive.recurrence(**x))


@kind
def test_segments_and_padding(name):
    x = inputs(name)
    # Documents of 9, 14 and 8 tokens, padding inside and at the end; the other row is one document after padding.
    segments = np.array([[1] * 9 + [2] * 14 + [0] * 2 + [3] * 8 + [0] * 4, [0] * 3 + [5] * 34], np.int32)
    for chunk in (8, T):
        got, expected = run(x, segments, chunk=chunk), naive.recurrence(**x, segments=segments)
        close((got[0][segments != 0], got[1]), (expected[0][segments != 0], expected[1]))


@kind
def test_tokens_that_are_not_real_leave_the_state(name):
    x = inputs(name)
    real = np.random.default_rng(1).uniform(size=(B, T)) < 0.6
    dirty = x | {"v": np.where(real[..., None, None], x["v"], 1e4).astype(np.float32)}
    for chunk in (8, T):
        got, expected = run(dirty, None, real, chunk=chunk), naive.recurrence(**x, real=real)
        close((got[0][real], got[1]), (expected[0][real], expected[1]))


@kind
def test_chunks_at_once_equal_chunks_in_turn(name):
    x = inputs(name)
    segments = np.array([[1] * 20 + [2] * 17, [1] * 37], np.int32)
    with kernels.choose("recurrence", "grouped"):
        got = jax.jit(lambda x: run.__wrapped__(x, segments, chunk=8))(x)
    close(got, naive.recurrence(**x, segments=segments))
