"""The chunked recurrence against the token-by-token one."""

import functools

import jax
import jax.numpy as jnp
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
# One of each rule and of each way of sharing queries and keys, where all kinds would show no more.
FEW = ["constant_grouped", "token_one_group", "channel", "gated_delta_grouped"]
few = pytest.mark.parametrize("name", FEW)
# Every rule once, sharing queries and keys where it can: what a head does with them does not depend on the sharing.
rules = pytest.mark.parametrize("name", ["none", *FEW, "channel_grouped", "delta"])


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


@pytest.mark.parametrize(("chunk", "name"), [(7, name) for name in KINDS] + [(c, n) for c in (1, 2 * T) for n in FEW])
def test_every_chunk_length_equals_the_naive_recurrence(chunk, name):
    x = inputs(name)
    close(run(x, chunk=chunk), naive.recurrence(**x))


@rules
def test_segments_and_padding(name):
    x = inputs(name)
    # Documents of 9, 14 and 8 tokens, padding inside and at the end; the other row is one document after padding.
    segments = np.array([[1] * 9 + [2] * 14 + [0] * 2 + [3] * 8 + [0] * 4, [0] * 3 + [5] * 34], np.int32)
    got, expected = run(x, segments, chunk=8), naive.recurrence(**x, segments=segments)
    close((got[0][segments != 0], got[1]), (expected[0][segments != 0], expected[1]))


@few
def test_tokens_that_are_not_real_leave_the_state(name):
    x = inputs(name)
    real = np.random.default_rng(1).uniform(size=(B, T)) < 0.6
    dirty = x | {"v": np.where(real[..., None, None], x["v"], 1e4).astype(np.float32)}
    got, expected = run(dirty, None, real, chunk=8), naive.recurrence(**x, real=real)
    close((got[0][real], got[1]), (expected[0][real], expected[1]))


@few
def test_chunks_at_once_equal_chunks_in_turn(name):
    x = inputs(name)
    segments = np.array([[1] * 20 + [2] * 17, [1] * 37], np.int32)
    with kernels.choose("recurrence", "grouped"):
        got = jax.jit(lambda x: run.__wrapped__(x, segments, chunk=8))(x)
    close(got, naive.recurrence(**x, segments=segments))


def loss(outputs):
    y, state = outputs
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))


@rules
def test_gradients_equal_those_of_the_naive_recurrence(name):
    x = {key: z for key, z in inputs(name).items() if z is not None}
    absent = {key: None for key in ("log_decay", "beta") if key not in x}
    got = jax.jit(jax.grad(lambda x: loss(run.__wrapped__(x | absent, chunk=16))))(x)
    expected = jax.jit(jax.grad(lambda x: loss(naive.differentiable(**x))))(x)
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, atol=1e-4 * max(1.0, float(np.abs(value).max())), err_msg=key)


@few
def test_one_token_at_a_time(name):
    x = inputs(name, length=5)
    state, ys = x["initial"], []
    for t in range(5):
        token = {key: z[:, t : t + 1] if z is not None and z.ndim > 1 else z for key, z in x.items()}
        y, state = run(token | {"initial": state}, chunk=8)
        ys.append(y)
    close((np.concatenate(ys, 1), state), naive.recurrence(**x))


def test_without_a_first_state_it_is_zero():
    # In one chunk each rule goes without a state; several chunks are given zeros, whatever the rule.
    for name, chunk in (("constant", 64), ("token", 64), ("channel", 64), ("gated_delta", 64), ("token", 8)):
        x = inputs(name) | {"initial": None}
        close(run(x, chunk=chunk), naive.recurrence(**x))


def test_no_decay_is_a_running_sum_and_full_decay_sees_the_token_alone():
    x = inputs("none") | {"initial": None}
    outer = np.einsum("bthn,bthk->bthnk", x["k"], x["v"])
    y, state = run(x, chunk=16)
    np.testing.assert_allclose(y, np.einsum("bthn,bthnk->bthk", x["q"], np.cumsum(outer, 1)), atol=2e-5)
    for shape in ((H,), (B, T, H), (B, T, H, N)):
        y, state = run(x | {"log_decay": np.full(shape, -np.inf, np.float32)}, chunk=16)
        close((y, state), (np.einsum("bthn,bthnk->bthk", x["q"], outer), outer[:, -1]))


@pytest.mark.parametrize("name", ["constant", "token", "channel", "gated_delta"])
def test_strong_decay_and_low_precision_stay_finite(name):
    # exp(sum) of these over a chunk overflows float32 in the factored form, exp(-c_s) of k.
    x = {key: z for key, z in inputs(name, length=64, strength=20.0).items() if z is not None}
    y, state = naive.recurrence(**x)
    low = {key: z.astype(jnp.bfloat16) if key in "qkv" else z for key, z in x.items()}

    def both(x):
        outputs = run.__wrapped__({"beta": None} | x, chunk=32)
        return loss(outputs), outputs

    (_, (y_low, state_low)), gradients = jax.jit(jax.value_and_grad(both, has_aux=True))(low)
    assert y_low.dtype == jnp.bfloat16 and state_low.dtype == jnp.float32
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(np.asarray(y_low, np.float32), y, atol=0.03 * np.abs(y).max())
    np.testing.assert_allclose(state_low, state, atol=0.03 * np.abs(state).max())
    # Sums of log decays reach 1e3 here, of which float32 keeps 1e-4.
    close(run({"beta": None} | x, chunk=32), (y, state), atol=2e-4)


def test_the_delta_rule_survives_repeated_keys():
    # All keys equal and beta = 1: every power of the chunk's triangular matrix is huge, its inverse is not.
    x = inputs("delta", length=128)
    x = x | {"k": np.broadcast_to(x["k"][:, :1], x["k"].shape), "beta": np.ones_like(x["beta"])}
    close(run(x, chunk=64), naive.recurrence(**x))


@pytest.mark.parametrize("name", ["constant", "channel", "gated_delta"])
def test_memory_of_the_backward_pass_is_linear_in_the_length(name):
    def temporary(length):
        x = {key: z for key, z in inputs(name, length=length).items() if z is not None}
        step = jax.jit(jax.grad(lambda x: loss(run.__wrapped__({"beta": None} | x, chunk=32))))
        return step.lower(x).compile().memory_analysis().temp_size_in_bytes

    # Four times the tokens take at most four times the memory, and all [T, T] scores would take this much alone.
    short, long = temporary(512), temporary(2048)
    assert long <= 4.4 * short
    assert long < 4 * B * H * 2048**2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"chunk": 0}, "chunk=0"),
        ({"q": np.zeros((B, T, 3, N)), "k": np.zeros((B, T, 3, N))}, "G divides"),
        ({"log_decay": np.zeros((H, N))}, "log_decay"),
        ({"log_decay": np.full(H, 0.5)}, "0.5"),
        ({"log_decay": jnp.full((B, T, H), -0.5).at[1, 2, 3].set(0.25)}, "log_decay=0.25 grows the state"),
        ({"log_decay": jnp.full(H, jnp.nan)}, "log_decay=nan"),
        ({"beta": np.zeros((B, T))}, "beta"),
        ({"beta": np.zeros((B, T, H)), "log_decay": np.zeros((B, T, H, N))}, "channel"),
    ],
)
def test_bad_arguments_are_named(change, word):
    x = inputs("none") | change
    with pytest.raises(ValueError, match=word):
        run.__wrapped__(x, chunk=x.pop("chunk", 8))
