"""The product of rows with a matrix in eight bits, forward and backward: `quantized_product`.

Letters: I and O, the width of a row before and after.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from layers import kernels

_TINY = float(jnp.finfo(jnp.float32).tiny)
# Rows of a history: what each of the three arrays of a product was at most.
INPUT, WEIGHT, GRADIENT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How one product is computed.

    forward: dtype of x and w. backward: dtype of the output's gradient g, None to leave it, and the products that it
        takes part in, in the dtype of g. rows: one scale for each row of a left operand and each column of a right
        one, along what is summed over; else one scale an array. exact_weight_gradient: dw = x^T g of unquantized
        arrays. emulate: multiply the quantized values in a dtype that holds them exactly, where the device cannot
        multiply eight bits. margin: delayed amaxes count 2^margin times.
    """

    forward: jnp.dtype
    backward: jnp.dtype | None
    rows: bool = False
    exact_weight_gradient: bool = False
    emulate: bool = False
    margin: int = 0

    def quantize(self, x: jax.Array, dtype: jnp.dtype, summed: tuple[int, ...], amax: jax.Array | None = None):
        """(values in `dtype`, float32 scale): x is about values * scale.

        The scale maps amax, by default max |x|, to the largest number of dtype: over the axes `summed` with `rows`,
        else over all. Values are clipped before the cast, which overflows to NaN in e4m3 and to infinity in e5m2. Zero
        stays zero, NaN stays NaN in a floating dtype and makes the scale NaN in any.
        """
        limit = largest(dtype)
        if amax is None:
            amax = jnp.max(jnp.abs(x), summed if self.rows else None, keepdims=self.rows).astype(jnp.float32)
        scale = jnp.maximum(amax / limit, _TINY)
        values = x.astype(jnp.float32) / scale
        if jnp.issubdtype(dtype, jnp.integer):
            values = jnp.round(values)
        return jnp.clip(values, -limit, limit).astype(dtype), scale

    def dot(self, a: jax.Array, b: jax.Array, summed: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
        """Sum of products over the axes `summed` of a and b, float32."""
        if self.emulate:
            # Eight bits fit bfloat16's nine and float32 without rounding; bfloat16 products are slow on CPU.
            exact = jnp.float32 if kernels.platform() == "cpu" else jnp.bfloat16
            a, b = a.astype(exact), b.astype(exact)
        integers = jnp.issubdtype(a.dtype, jnp.integer)
        sums = jnp.int32 if integers else jnp.float32
        return jax.lax.dot_general(a, b, (summed, ((), ())), preferred_element_type=sums).astype(jnp.float32)


def largest(dtype: jnp.dtype) -> float:
    """The largest finite number of an eight-bit dtype that has its negative: 448 (e4m3), 57344 (e5m2), 127 (int8)."""
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def delayed_amaxes(history: jax.Array | None, margin: int) -> tuple[jax.Array | None, ...]:
    """amax of x, w and g for the next step: the largest in the history [3, steps], float32 scalars; None without one.

    What is expected before anything was seen stands in the history as a negative number.
    """
    if history is None:
        return None, None, None
    seen = jnp.max(history, 1)
    amax = jnp.where(seen > 0, seen, jnp.max(-history, 1)) * 2.0**margin
    return tuple(amax)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(how: Arithmetic, x: jax.Array, w_IO: jax.Array, history: jax.Array | None = None) -> jax.Array:
    """x [..., I] times w_IO -> [..., O] in the dtype of x: forward y = q(x) q(w), backward dx = q(g) q(w)^T and
    dw = q(x)^T q(g), where q quantizes as `how` says (torchao's float8 recipes; Micikevicius et al. 2022, arXiv
    2209.05433). Rounding counts as the identity in the derivative.

    history: [3, steps] amaxes of x, w and g in earlier steps (delayed scaling): their maximum sets the scales. Its
    "gradient" is the statistic of this step, see `Amaxes`.
    """
    return _forward(how, x, w_IO, history)[0]


def _forward(how, x, w_IO, history):
    last, (x_amax, w_amax, _) = x.ndim - 1, delayed_amaxes(history, how.margin)
    qx, sx = how.quantize(x, how.forward, (last,), x_amax)
    qw, sw = how.quantize(w_IO, how.forward, (0,), w_amax)
    y = how.dot(qx, qw, ((last,), (0,))) * sx * _flat(sw)
    now = None if history is None else jnp.stack([_amax(x), _amax(w_IO)])
    # Scales of rows serve one direction of summing: then the backward pass quantizes anew.
    again = how.rows and how.backward is not None
    kept_x = (x, None) if again or how.exact_weight_gradient else (qx, sx)
    kept_w = (w_IO, None) if again else (qw, sw)
    like_w = jnp.zeros((), w_IO.dtype)
    return y.astype(x.dtype), (kept_x, kept_w, like_w, history, now)


def _backward(how, residuals, g):
    (x, sx), (w, sw), like_w, history, now = residuals
    last, leading = g.ndim - 1, tuple(range(g.ndim - 1))
    g_amax = delayed_amaxes(history, how.margin)[2]
    if how.backward is None:
        wide = jnp.float32 if like_w.dtype == jnp.float32 else like_w.dtype
        dx = jax.lax.dot_general(g, _wide(w, sw, wide), (((last,), (1,)), ((), ())))
        dw = jax.lax.dot_general(_wide(x, sx, g.dtype), g, ((leading, leading), ((), ())))
        return dx.astype(g.dtype), dw.astype(like_w.dtype), None
    qg, sg = how.quantize(g, how.backward, (last,), g_amax)
    if sw is None:
        w, sw = how.quantize(w, how.forward, (1,))
    dx = how.dot(qg, w, ((last,), (1,))) * sg * _flat(sw)
    if how.exact_weight_gradient:
        dw = jax.lax.dot_general(x, g, ((leading, leading), ((), ())), preferred_element_type=jnp.float32)
    else:
        if sx is None:
            (x, sx), (qg, sg) = how.quantize(x, how.forward, leading), how.quantize(g, how.backward, leading)
        dw = how.dot(x, qg, (leading, leading)) * jnp.reshape(sx, (-1, 1)) * _flat(sg)
    statistic = None if history is None else report(history, jnp.concatenate([now, _amax(g)[None]]))
    return dx.astype(g.dtype), dw.astype(like_w.dtype), statistic


quantized_product.defvjp(_forward, _backward)


def _flat(scale):
    """A scale of columns along the last axis of a result; one scale as it is."""
    return jnp.reshape(scale, (-1,))


def _wide(values, scale, dtype):
    return values if scale is None else (values.astype(jnp.float32) * scale).astype(dtype)


def _amax(x):
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def report(history: jax.Array, amax_3: jax.Array) -> jax.Array:
    """The statistic that carries the amaxes of one use of a weight to `Amaxes`, in the shape of the history."""
    pair = jnp.stack([jnp.square(amax_3), amax_3], 1)
    return jnp.pad(pair, ((0, 0), (0, history.shape[1] - 2))).astype(history.dtype)


@dataclasses.dataclass(frozen=True)
class Amaxes:
    """The rule of a history [..., 3, steps]: forgets the oldest step, takes in the newest.

    A weight may be used many times a step (micro-batches, ticks of a pipeline, parts of a sharded batch) and the
    uses' statistics arrive added up. Each reports (a^2, a): the quotient of the sums is a itself where all agree, and
    else a mean that leans to the largest; uses that saw only zeros do not count.
    """

    def __call__(self, history: jax.Array, statistic: jax.Array) -> jax.Array:
        squares, sums = statistic[..., :1], statistic[..., 1:2]
        amax = squares / jnp.where(sums > 0, sums, 1.0)
        moved = jnp.concatenate([amax, history[..., :-1]], -1)
        return jnp.where(sums > 0, moved, history)
