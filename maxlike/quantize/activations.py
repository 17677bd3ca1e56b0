"""Fake quantization of activations and of the cache, by taps: numbers rounded to a few levels where they flow."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers import taps
from layers.linear import Linear
from layers.parts import parts
from layers.stack import Stack
from maxlike.metrics import Mean
from maxlike.quantize import targets
from maxlike.quantize.recipe import Recipe


def asymmetric(x: jax.Array, bits: int, *, with_zero: bool) -> jax.Array:
    """x [..., n] rounded to 2^bits values between the smallest and the largest of each vector, in the dtype of x.

    with_zero: the range also holds 0. A vector of equal numbers without it is exact.
    """
    x32, levels = x.astype(jnp.float32), 2**bits - 1
    low, high = jnp.min(x32, -1, keepdims=True), jnp.max(x32, -1, keepdims=True)
    if with_zero:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = jnp.where(high > low, (high - low) / levels, 1.0)
    zero = jnp.round(-low / scale)
    codes = jnp.clip(jnp.round(x32 / scale) + zero, 0, levels)
    return jnp.where(high > low, scale * (codes - zero), x32).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class FakeQuantized:
    """An objective whose model computes with quantized activations and cache (arXiv 2506.19697, section 5).

    Inputs of the linear layers inside the blocks: asymmetric, dynamic, one range a token with 0 in it; that of an
    output projection one range a head, without. Values: one range a token and head, without 0. Keys, after rotary
    positions: one range a token and head, with 0, in the basis of a Hadamard rotation of head_dim; queries, rotated
    alike, leave the scores as they were, so keys are turned back instead and queries left alone. Inputs that the
    recipe rotates are rounded in that basis and turned back, too.
    """

    objective: Callable
    recipe: Recipe

    def __call__(self, model: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> tuple[Mean, dict[str, Mean]]:
        with taps.opened(self._functions(model)):
            return self.objective(model, batch, key)

    def _functions(self, model: Any) -> dict[str, Callable]:
        functions = {}
        if self.recipe.activations < 16:
            inside = {id(part) for stack in parts(model, Stack) for part in _linears(stack)}
            outside = {id(part) for part in _linears(model)} - inside
            functions["linear_input"] = lambda x, owner: x if id(owner) in outside else self.input(x, owner)
        if self.recipe.cache < 16:
            functions |= {"keys": self.keys, "values": self.values}
        return functions

    def input(self, x: jax.Array, linear: Linear) -> jax.Array:
        if targets.deciding(linear) is not None:
            return x
        dims = linear.input_dims
        shape = x.shape[x.ndim - dims :]
        rotation = targets.reading(self.recipe, targets.logical(linear.kernel)[:dims], shape)
        if rotation is None:
            return asymmetric(x, self.recipe.activations, with_zero=dims == 1)
        flat = jnp.reshape(x, (*x.shape[: x.ndim - dims], -1))
        rounded = asymmetric(jnp.reshape(rotation(flat), x.shape), self.recipe.activations, with_zero=dims == 1)
        back = rotation.inverse(jnp.reshape(rounded, flat.shape))
        return jnp.reshape(back, x.shape).astype(x.dtype)

    def keys(self, k_BTGK: jax.Array, owner: Any) -> jax.Array:
        rotation = targets.of_heads(self.recipe, k_BTGK.shape[-1], type(owner).__name__)
        rounded = asymmetric(rotation(k_BTGK), self.recipe.cache, with_zero=True)
        return rotation.inverse(rounded).astype(k_BTGK.dtype)

    def values(self, v_BTGK: jax.Array, owner: Any) -> jax.Array:
        if self.recipe.rotation != "full":
            return asymmetric(v_BTGK, self.recipe.cache, with_zero=False)
        rotation = targets.of_heads(self.recipe, v_BTGK.shape[-1], type(owner).__name__)
        rounded = asymmetric(rotation(v_BTGK), self.recipe.cache, with_zero=False)
        return rotation.inverse(rounded).astype(v_BTGK.dtype)


def _linears(network: Any) -> list[Linear]:
    return parts(network, Linear)
