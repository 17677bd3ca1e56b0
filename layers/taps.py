"""Taps: named places of a network where what flows through it can be observed or changed, from outside.

    def observe(x, owner):
        seen.append(x)
        return x

    with taps.opened({"residual": observe}):
        output = network(tokens, ctx)

Taps are a matter of tracing: they must be opened inside the function that is jitted, not around a compiled one. With
none open a tap leaves no trace in the program. Inside `lax.scan` or `jax.checkpoint` a tap sees tracers of that body,
which cannot be carried out of it: a network that `stack.lay_bare` made has neither.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

NAMES = {
    "residual": "residual stream [B, T, D]: output of the embedding and of every block (owner: that module)",
    "linear_input": "input of every Linear [..., *inputs] (owner: it); the head is none",
    "queries": "queries [B, T, H, K] as attention takes them, normed and rotated (owner: the attention)",
    "keys": "keys [B, T, G, K] as attention and the cache take them, normed and rotated (owner: the attention)",
    "values": "values [B, T, G, K] as attention and the cache take them (owner: the attention)",
    "attention_output": "mixed values [B, T, H, K], before a gate at g1 (owner: the attention)",
    "gated_output": "the same after the gate, as the output projection takes it (owner: the attention)",
    "gate": "scores of an AttentionGate, in a shape that spreads over what they gate (owner: the gate)",
}

Function = Callable[[jax.Array, Any], jax.Array]
_functions: contextvars.ContextVar[dict[str, tuple[Function, ...]]] = contextvars.ContextVar("taps", default={})  # noqa: B039


def tap(name: str, x: jax.Array, owner: Any = None) -> jax.Array:
    """x, as the functions of the open taps of this name leave it. owner: the module in which it is.

    Raises ValueError for a name that is not in NAMES, and where a function changes shape or dtype.
    """
    _check(name)
    for function in _functions.get().get(name, ()):
        y = function(x, owner)
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"the tap {name!r} of {type(owner).__name__} got {x.dtype}{list(x.shape)} and its function returned "
                f"{y.dtype}{list(y.shape)}: return an array of the same shape and dtype"
            )
        x = y
    return x


@contextlib.contextmanager
def opened(functions: Mapping[str, Function]) -> Iterator[None]:
    """Inside this context, while tracing, `tap(name, x, owner)` becomes `functions[name](x, owner)`. Contexts nest: the
    outer one's function sees x first. A function that only observes returns x. Raises ValueError for unknown names."""
    for name in functions:
        _check(name)
    outer = _functions.get()
    token = _functions.set(outer | {name: (*outer.get(name, ()), function) for name, function in functions.items()})
    try:
        yield
    finally:
        _functions.reset(token)


def is_open(*names: str) -> bool:
    """Whether a tap of one of these names has a function: a layer that can compute its output without ever making what
    the tap would see then has to make it."""
    return any(name in _functions.get() for name in names)


def _check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"there is no tap {name!r}: use one of {', '.join(NAMES)}")
