"""Every implementation of attention against its definition, values and gradients, and what kernels report."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import axes, kernels
from maxlike.sharding import Mesh
from tests.reference.attention import attention as naive

# T is no multiple of a block of 64 queries, so blocks are ragged and windows cross them.
B, T, K = 2, 100, 8


def inputs(heads: int, kv_heads: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = ((B, T, heads, K), (B, T, kv_heads, K), (B, T, kv_heads, K), (B, T, heads, K))
    q, k, v, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    return q, k, v, jax.random.normal(keys[4], (heads,)), weights


SEGMENTS = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], [40, 1, 39, 20]), np.repeat([1, 2], [70, 30])]), jnp.int32)
# Each value of each feature meets each value of every other one at least once (a covering array by hand).
COMBINATIONS = [
    # heads, kv_heads, causal, window, soft_cap, segments, sinks
    (2, 2, True, None, None, False, False),
    (4, 2, True, None, 3.0, True, True),
    (4, 1, True, 17, None, True, False),
    (4, 2, True, 70, 3.0, False, True),
    (4, 2, False, None, None, True, True),
    (4, 1, False, None, 3.0, False, False),
    (2, 2, False, 17, 3.0, True, False),
    (2, 2, True, 1, None, False, True),
    (4, 1, False, 70, None, False, True),
]


def value_and_gradients(function, combination):
    heads, kv_heads, causal, window, soft_cap, segments, sinks = combination
    q, k, v, sinks_H, weights = inputs(heads, kv_heads)

    @jax.jit
    def run(q, k, v, sinks_H):
        def total(q, k, v, sinks_H):
            y = function(
                q, k, v, scale=0.3, causal=causal, window=window, soft_cap=soft_cap,
                segments_BT=SEGMENTS if segments else None, sinks_H=sinks_H if sinks else None,
            )  # fmt: skip
            return jnp.sum(y * weights), y

        (_, y), gradients = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, sinks_H)
        return y, *gradients

    return run(q, k, v, sinks_H)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c)))
def test_attention_equals_its_definition_in_value_and_gradient(combination):
    expected = value_and_gradients(naive, combination)
    for implementation in ("blocked", "xla"):
        with kernels.choose("attention", implementation):
            got = value_and_gradients(kernels.attention, combination)
        for name, a, b in zip(("y", "dq", "dk", "dv", "dsinks"), got, expected):
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4, err_msg=f"{implementation} {name}")


@pytest.mark.parametrize("combination", [COMBINATIONS[1], COMBINATIONS[6]], ids=["causal", "window"])
def test_chunks_of_a_long_row_equal_its_definition(combination, monkeypatch):
    small = functools.partial(kernels.chunked_attention, chunk=16)  # 100 tokens: quarters of 32, the last one ragged
    monkeypatch.setattr(kernels, "chunked_attention", small)
    with kernels.choose("attention", "chunked"):
        got = value_and_gradients(kernels.attention, combination)
    for a, b in zip(got, value_and_gradients(naive, combination)):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)


def test_a_long_row_never_holds_all_its_scores():
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 1, K), jnp.float32)

    def total(q, k, v):
        return jnp.sum(kernels.attention(q, k, v, scale=0.3, causal=True))

    kernels.forget()
    memory = jax.jit(jax.grad(total)).lower(q, q, q).compile().memory_analysis()
    assert kernels.report()[0][1] == "chunked"
    assert memory.temp_size_in_bytes < length * length * 4 / 4


def test_bfloat16_keeps_its_dtype_and_stays_near_float32():
    q, k, v, _, _ = inputs(4, 2)
    exact = naive(q, k, v, scale=0.3, causal=True)
    low = kernels.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), scale=0.3, causal=True)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=0.05)


def test_choices_are_recorded_with_their_reason():
    q = jnp.zeros((1, 8, 2, 12))
    kernels.forget()
    kernels.attention(q, q, q, scale=1.0, causal=True)
    with kernels.choose("attention", "xla"):
        kernels.attention(q, q, q, scale=1.0, causal=True)
    assert [(op, name) for op, name, _ in kernels.report()] == [("attention", "blocked"), ("attention", "xla")]
    assert kernels.report()[1][2] == "chosen by hand"


@pytest.mark.parametrize(
    ("dtype", "head_dim", "knobs", "expected", "word"),
    [
        (jnp.bfloat16, 64, {}, "cudnn", "cuDNN"),
        (jnp.float32, 64, {}, "blocked", "float32"),
        (jnp.bfloat16, 12, {}, "blocked", "head_dim 12"),
        (jnp.bfloat16, 64, {"soft_cap": 3.0}, "blocked", "soft-cap"),
        (jnp.bfloat16, 64, {"sinks_H": jnp.zeros(2, jnp.bfloat16)}, "blocked", "sinks"),
    ],
)
def test_a_gpu_takes_cudnn_or_says_why_not(dtype, head_dim, knobs, expected, word, monkeypatch):
    q = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
    knobs = {"soft_cap": None, "window": None, "segments_BT": None, "sinks_H": None} | knobs
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        implementation, reason = kernels.pick_attention(q, **knobs)
    assert implementation == expected and word in reason


def test_a_program_for_another_platform_can_be_traced_here():
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    for name in ("gpu", "tpu"):
        kernels.forget()
        with kernels.compile_for(name):
            jax.eval_shape(lambda q: kernels.attention(q, q, q, scale=1.0, causal=True), q)
        assert kernels.report()[0][1] == "blocked" and len(kernels.report()[0][2]) > 10


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no implementation 'fast'"), kernels.choose("attention", "fast"):
        pass
    with pytest.raises(ValueError, match="platform 'npu'"), kernels.compile_for("npu"):
        pass


def test_every_pair_of_feature_values_is_covered():
    for i, j in itertools.combinations(range(2, 7), 2):
        values = [{bool(c[k]) for c in COMBINATIONS} for k in (i, j)]
        pairs = {(bool(c[i]), bool(c[j])) for c in COMBINATIONS}
        assert pairs == set(itertools.product(*values)), f"columns {i} and {j} miss a pair"


# The flash kernel for TPUs, run by the interpreter: rows of two blocks.
SPLASH = [(4, 2, True, 130, 3.0, True, True), (2, 2, False, 17, None, False, False)]


@pytest.mark.parametrize("combination", SPLASH, ids=lambda c: "-".join(map(str, c)))
def test_the_flash_kernel_of_tpus_equals_its_definition(combination, monkeypatch):
    monkeypatch.setattr(f"{__name__}.T", 256)
    monkeypatch.setattr(f"{__name__}.SEGMENTS", jnp.asarray([np.repeat([1, 2, 0], [100, 136, 20])] * B, jnp.int32))
    with kernels.choose("attention", "splash"):
        got = value_and_gradients(kernels.attention, combination)
    expected = value_and_gradients(naive, combination)
    for name, a, b in zip(("y", "dq", "dk", "dv", "dsinks"), got, expected):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4, err_msg=name)


def test_on_a_mesh_each_device_runs_the_flash_kernel_on_its_rows_and_heads():
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 128, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    segments = jnp.repeat(jnp.arange(4), 32)[None].repeat(4, 0)

    def gradients(*qkv):
        attend = functools.partial(kernels.attention, scale=0.3, causal=True, segments_BT=segments)
        return jax.grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv))), argnums=(0, 1, 2))(*qkv)

    with kernels.choose("attention", "splash"):
        expected = jax.jit(gradients)(q, k, v)
        layout = Mesh(
            shape={"data": 4, "tensor": 2}, rules={"batch": "data", "length": None, "act_heads": "tensor"}
        ).open()
        with axes.place_with(layout):
            sharding = jax.sharding.NamedSharding(layout.mesh, jax.P("data", None, "tensor"))
            got = jax.jit(gradients)(*(jax.device_put(x, sharding) for x in (q, k, v)))
    for a, b in zip(got, expected):
        assert a.sharding.is_equivalent_to(sharding, 4)
        np.testing.assert_allclose(a, b, atol=1e-5)
