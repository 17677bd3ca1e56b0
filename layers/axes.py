"""The vocabulary of logical axes, and the only two functions that use it: `param` and `constrain`.

A parameter says what each of its dimensions *means*. Sharding rules, Muon's matrix view, weight-decay masks and the
parameter table all read that one tuple; names of parameters are never parsed.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

PARAMETER_AXES = {
    "vocab": "token ids",
    "embed": "model width (D)",
    "embed_out": "model width as the output side of a square projection, so that no array names one axis twice",
    "heads": "query heads (H)",
    "kv_heads": "key and value heads (G)",
    "head_dim": "width of a head (K)",
    "latent": "compressed width of queries, or of keys and values (MLA)",
    "mlp": "feed-forward width (F)",
    "experts": "experts (E)",
    "auxiliary": "hidden width of an auxiliary router",
    "groups": "groups of heads that share the keys and queries of a recurrent state",
    "state": "recurrent state width (N)",
    "taps": "convolution taps",
    "positions": "learned positions: absolute, or buckets of distances",
    "patch": "values of a patch of a picture",
    "code": "width of a quantizer's code",
    "norm": "a gain or an offset of a normalisation",
    "layers": "stacked layers (L), added by Stack",
}
ACTIVATION_AXES = {
    "batch": "examples (B)",
    "length": "positions (T)",
    "act_embed": "model width of an activation (D)",
    "act_heads": "heads of an activation (H or G)",
    "act_mlp": "feed-forward width of an activation (F)",
    "act_vocab": "logits (V)",
    "cache_length": "positions of a decoding cache (S)",
    "matrices": "a stack of same-shape matrices that an optimizer orthogonalises (Muon.stack_shards)",
}

Init = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Placement = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding | None]


class Buffer(nnx.Variable):
    """Non-trained state of a module (a router bias, a running statistic): saved, never touched by the optimizer. Made
    by `buffer`."""


def keep(value: jax.Array, statistic: jax.Array) -> jax.Array:
    """The rule of a buffer that training does not change."""
    return value


def normal(stddev: float = 0.02) -> Init:
    """Gaussian initialiser with a fixed standard deviation."""
    return jax.nn.initializers.normal(stddev)


NORMAL = normal()


class Keys:
    """The keys of a tree of modules, in order of use; what `nnx.Rngs(params=key)` gives, which may stand in its place.

    Its counter is a plain number: the array that flax counts with makes tracing quadratic in the number of parameters.
    """

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count += 1
        return key


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Init = NORMAL, *, exact: bool = False
) -> nnx.Param:
    """A float32 parameter that carries its logical axes as metadata `axes`.

    exact: it is used in float32 whatever the compute dtype (a router's weights, rates of decay), so that rounding
    neither flips a choice nor compounds over a row.

    Raises ValueError where the axes do not name every dimension, or name one that the vocabulary does not know.
    """
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} logical axes, got {axes}")
    unknown = [axis for axis in axes if axis not in PARAMETER_AXES]
    if unknown:
        raise ValueError(
            f"unknown logical axis {unknown[0]!r}: add it to layers/axes.py or use one of {sorted(PARAMETER_AXES)}"
        )
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, exact=exact)


Rule = Callable[[jax.Array, jax.Array], jax.Array]


def buffer(value: jax.Array, axes: tuple[str, ...], rule: Rule = keep) -> Buffer:
    """A float32 Buffer that carries its logical axes and its rule.

    After every accepted step its value becomes `rule(value, statistic)`; the statistic is what the module gave to
    `measure`, averaged over the micro-batches. A rule is a pure function or a frozen dataclass (it is part of the
    module's static structure) and works on the last dimensions, for Stack puts a "layers" dimension in front of both.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"a buffer of shape {value.shape} needs {value.ndim} logical axes, got {axes}")
    return Buffer(value.astype(jnp.float32), axes=axes, rule=rule)


@jax.custom_vjp
def measure(y: jax.Array, value: jax.Array, statistic: jax.Array) -> jax.Array:
    """y itself; on the way reports `statistic` (same shape as the buffer's `value`) to the buffer's rule.

    The statistic travels as the buffer's "gradient", so it arrives in the right place through scan, remat, sharding
    and micro-batches, over all tokens of the global batch, with nothing returned beside y. y must take part in the
    loss; any other use of the buffer goes through `jax.lax.stop_gradient`.
    """
    return y


def _measure_forward(y, value, statistic):
    return y, statistic.astype(value.dtype)


def _measure_backward(statistic, g):
    return g, statistic, jnp.zeros_like(statistic)


measure.defvjp(_measure_forward, _measure_backward)

_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def place_with(placement: Placement | None) -> Iterator[None]:
    """Inside this context `constrain` asks `placement(axes, shape)` for the sharding of an activation."""
    token = _placement.set(placement)
    try:
        yield
    finally:
        _placement.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States what the dimensions of an activation mean; under a mesh this fixes its sharding, without one it is x."""
    placement = _placement.get()
    if placement is None:
        return x
    sharding = placement(axes, x.shape)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
