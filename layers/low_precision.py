"""Training in eight bits: `Float8` and `Int8` change how the Linear layers of a network multiply.

Both are written in jax's own types: qwix swaps `jax.lax.dot_general` under a module that it finds through flax's
transforms, which this project does not use, and it knows no delayed scaling.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from layers import axes, kernels
from layers.experts import Experts
from layers.linear import Linear, Product
from layers.parts import parts
from layers.quantized_product import GRADIENT, INPUT, Amaxes, Arithmetic, quantized_product

# Products whose result picks something (a token, an expert): rounding would flip the choice.
DECIDING = ("vocab", "experts", "auxiliary")
_MULTIPLE = 16  # what an eight-bit matrix unit wants of both sides
# Expected before the first step, generously: e4m3 spans 2^18, e5m2 2^32. Losses are sums over tokens, so the gradient
# at a token does not depend on the batch.
_EXPECTED = {INPUT: 16.0, GRADIENT: 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8:
    """FP8 training (Micikevicius et al. 2022, arXiv 2209.05433): called on a network, it makes its Linear layers
    multiply e4m3 inputs and weights, and e5m2 gradients, summing in float32. Returns the same network.

    Output heads, routers, experts, and matrices with a side below `smallest` or not a multiple of 16 stay in the
    compute dtype; the start table names them. Everything else is as without: master weights, optimizer, attention.
    Delayed scaling adds its histories to the model's buffers, so its checkpoints and those of others do not mix.

    Knobs:
        scaling: "tensor", one scale an array from its own largest number; "row", one for each row of the inputs and
        column of the weight, quantized anew for either gradient; "delayed", one scale an array from the largest number
        of the `history` steps before (Transformer Engine), so that no pass over the array comes before its cast.
        history: steps, 2..128 (every device holds all). margin: delayed scales leave room for numbers 2^margin times as
        large as any remembered, 0..8; what is larger still is clipped.
        exact_weight_gradient: the product that gives the weight's gradient stays in the compute dtype (torchao's
        rowwise_with_gw_hp).
        smallest: see above, >= 16.
        emulate: quantize, but multiply in a wider dtype: the same numbers at no gain, on any device.
    Refuses, when a step is traced, a device that cannot multiply FP8: GPUs below compute capability 8.9, TPUs before
    the seventh generation, CPUs; emulate=True is for these.
    """

    scaling: Literal["tensor", "row", "delayed"] = "tensor"
    history: int = 16
    margin: int = 0
    exact_weight_gradient: bool = False
    smallest: int = 128
    emulate: bool = False

    def __post_init__(self):
        if self.scaling not in ("tensor", "row", "delayed"):
            raise ValueError(f"Float8.scaling={self.scaling!r} must be 'tensor', 'row' or 'delayed'")
        if not 2 <= self.history <= 128:
            raise ValueError(f"Float8.history={self.history} must lie in 2..128 steps")
        if not 0 <= self.margin <= 8 or (self.margin and self.scaling != "delayed"):
            raise ValueError(
                f"Float8.margin={self.margin} must lie in 0..8, and be 0 unless Float8.scaling is 'delayed'"
            )
        if self.smallest < 16:
            raise ValueError(f"Float8.smallest={self.smallest} must be at least 16")

    def __call__(self, network: Any) -> Any:
        how = Arithmetic(
            forward=jnp.float8_e4m3fn,
            backward=jnp.float8_e5m2,
            rows=self.scaling == "row",
            exact_weight_gradient=self.exact_weight_gradient,
            emulate=self.emulate,
            margin=self.margin,
        )
        name, history = f"float8 {self.scaling}", self.history if self.scaling == "delayed" else None
        return _install(
            network,
            lambda linear: EightBits(name, how, linear, history),
            lambda linear: _left_alone(linear, f"Float8.smallest={self.smallest}", self.smallest),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """Int8 training (AQT; Wortsman et al. 2023, arXiv 2304.13013): called on a network, it makes its Linear layers
    multiply inputs and weights rounded to 8-bit integers, summing in int32. Returns the same network.

    The derivative takes rounding for the identity and uses the rounded inputs and weights (straight-through). What
    stays in the compute dtype is as for Float8.

    Knobs: scaling, "row" or "tensor", as for Float8; gradients: "compute" leaves the two backward products in the
    compute dtype, "int8" rounds gradients too; smallest >= 16 and emulate as for Float8.
    Refuses, when a step is traced, a device that cannot multiply int8 fast: GPUs below compute capability 7.5, TPUs
    before the fifth generation, CPUs; emulate=True is for these.
    """

    scaling: Literal["tensor", "row"] = "row"
    gradients: Literal["compute", "int8"] = "compute"
    smallest: int = 128
    emulate: bool = False

    def __post_init__(self):
        if self.scaling not in ("tensor", "row"):
            raise ValueError(f"Int8.scaling={self.scaling!r} must be 'tensor' or 'row'")
        if self.gradients not in ("compute", "int8"):
            raise ValueError(f"Int8.gradients={self.gradients!r} must be 'compute' or 'int8'")
        if self.smallest < 16:
            raise ValueError(f"Int8.smallest={self.smallest} must be at least 16")

    def __call__(self, network: Any) -> Any:
        backward = jnp.int8 if self.gradients == "int8" else None
        how = Arithmetic(forward=jnp.int8, backward=backward, rows=self.scaling == "row", emulate=self.emulate)
        return _install(
            network,
            lambda linear: EightBits(f"int8 {self.scaling}", how, linear, None),
            lambda linear: _left_alone(linear, f"Int8.smallest={self.smallest}", self.smallest),
        )


class EightBits(Product):
    """The product of a Linear layer in eight bits; with delayed scaling it holds the history of amaxes.

    history: [3, steps] for x, w and their product's gradient; stacked layers each have their own.
    """

    def __init__(self, name: str, how: Arithmetic, linear: Linear, history: int | None):
        self.name, self.how = name, how
        self.history = None if history is None else _first_history(linear, history)

    def __call__(self, x: jax.Array, w_IO: jax.Array) -> jax.Array:
        refuse_device(self.name, self.how)
        emulated = ", emulated: no faster" if self.how.emulate else ""
        kernels.take("products", self.name, f"of Linear layers{emulated}")
        history = None if self.history is None else self.history[...]
        return quantized_product(self.how, x, w_IO, history)


def _first_history(linear: Linear, steps: int) -> axes.Buffer:
    """What is expected of the first step: the weight's own amax, and guesses for inputs and gradients."""
    kernel = linear.kernel[...]
    layers = [axis for axis in linear.kernel.get_metadata("axes") if axis == "layers"]
    stacked = kernel.shape[: len(layers)]
    amax = jnp.max(jnp.abs(kernel), tuple(range(len(layers), kernel.ndim)))
    expected = (jnp.full(stacked, _EXPECTED[INPUT]), amax, jnp.full(stacked, _EXPECTED[GRADIENT]))
    value = jnp.broadcast_to(-jnp.stack(expected, -1)[..., None], (*stacked, 3, steps))
    return axes.buffer(value, (*layers, "norm", "taps"), Amaxes())


class LeftAlone(Product):
    """The product in the compute dtype of a layer that eight bits pass over, and why."""

    def __init__(self, why: str):
        self.why = why

    def __call__(self, x: jax.Array, w_IO: jax.Array) -> jax.Array:
        kernels.take("products", "compute dtype", self.why)
        return super().__call__(x, w_IO)


def _left_alone(linear: Linear, knob: str, smallest: int) -> str | None:
    """Why a layer stays in the compute dtype, None where it does not."""
    deciding = [axis for axis in linear.kernel.get_metadata("axes") if axis in DECIDING]
    if deciding:
        return f"decides on {deciding[0]}"
    sides, shape = (linear.inputs, linear.outputs), f"{linear.inputs} x {linear.outputs}"
    if min(sides) < smallest:
        return f"{shape} is below {knob}"
    if any(side % _MULTIPLE for side in sides):
        return f"{shape} is no multiple of {_MULTIPLE}"
    return None


def _install(network: Any, product: Callable, left_alone: Callable) -> Any:
    for experts in parts(network, Experts):
        experts.note = ("compute dtype", "experts: there is no grouped product in eight bits")
    for linear in parts(network, Linear):
        why = left_alone(linear)
        linear.product = product(linear) if why is None else LeftAlone(why)
    return network


def refuse_device(name: str, how: Arithmetic) -> None:
    """Raises ValueError where the device that a program is traced for cannot multiply in these dtypes."""
    kind = "Int8" if how.forward == jnp.int8 else "Float8"
    wanted = None if how.emulate else missing(kind)
    if wanted is not None:
        raise ValueError(
            f"{kind} ({name}) needs {wanted} and this is {axes.device().device_kind!r}: set {kind}.emulate=True for "
            "the same numbers at no gain, or Experiment.products=None for the compute dtype"
        )


def missing(kind: Literal["Float8", "Int8"]) -> str | None:
    """What the device that a program is traced for would have to be; None where it can multiply so, and where it is not
    here (a program compiled for another platform)."""
    device = axes.device()
    if device.platform != kernels.platform():
        return None
    if device.platform == "gpu":
        needed = (7, 5) if kind == "Int8" else (8, 9)
        found = re.fullmatch(r"(\d+)\.(\d+)", str(device.compute_capability))
        capable = found is not None and (int(found[1]), int(found[2])) >= needed
        wanted = f"a GPU of compute capability {needed[0]}.{needed[1]} or above"
    elif device.platform == "tpu":
        needed = 5 if kind == "Int8" else 7
        found = re.search(r"TPU ?v?(\d+)", device.device_kind)
        capable, wanted = found is not None and int(found[1]) >= needed, f"a TPU of generation {needed} or above"
    else:
        capable, wanted = False, "a GPU or TPU"
    return None if capable else wanted
