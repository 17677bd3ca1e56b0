"""Linear: an affine map between groups of named dimensions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from layers import axes, taps

# What remat policies may keep by name: a projection's output or input, by the logical axes on that side.
OUTPUT_NAMES = {"heads": "qkv", "kv_heads": "qkv", "groups": "qkv", "latent": "qkv", "mlp": "mlp_up"}
INPUT_NAMES = {"heads": "attn_out", "mlp": "mlp_in"}


@jax.custom_vjp
def _product(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    return x @ w_IO


def _product_forward(x, w_IO):
    return x @ w_IO, (x, w_IO)


def _product_backward(residuals, g):
    # The weight's gradient transposes one of two tall arrays: take the narrower. The default transposes g, which for a
    # feed-forward costs a slow copy of [tokens, F] (14 % of a step on CPU); x^T is shared by gate and up, or q, k, v.
    x, w_IO = residuals
    rows = tuple(range(x.ndim - 1))
    if w_IO.shape[0] <= w_IO.shape[1]:
        dw = jax.lax.dot_general(x, g, ((rows, rows), ((), ())))
    else:
        dw = jax.lax.dot_general(g, x, ((rows, rows), ((), ()))).T
    return jax.lax.dot_general(g, w_IO, (((g.ndim - 1,), (1,)), ((), ()))), dw


_product.defvjp(_product_forward, _product_backward)


class Product(nnx.Module):
    """How a Linear layer multiplies: x [..., I], w_IO -> [..., O] in the dtype of both. `layers.low_precision` puts
    others in the place of this one."""

    def __call__(self, x: jax.Array, w_IO: jax.Array) -> jax.Array:
        return _product(x, w_IO)


class Linear(nnx.Module):
    """y = x W + b over the last dimensions of x.

    x: [..., *inputs]; y: [..., *outputs]. The weight has shape (*inputs, *outputs) and axes (*input_axes,
    *output_axes), so a projection to heads is `Linear((D,), (H, K), ("embed",), ("heads", "head_dim"))` and its matrix
    view is D x HK.

    Knobs: bias, a learned offset of shape `outputs`, from zero; std, standard deviation of the initial weight, None for
    1 / sqrt(fan in); init, an initialiser of the weight in place of that Gaussian, or None.
    Refuses std <= 0, and std beside init.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        input_axes: tuple[str, ...],
        output_axes: tuple[str, ...],
        *,
        bias: bool = False,
        std: float | None = None,
        init: axes.Init | None = None,
        rngs: nnx.Rngs,
    ):
        if std is not None and (std <= 0 or init is not None):
            raise ValueError(f"Linear.std={std} must be positive, or None for 1/sqrt(fan in) or where there is an init")
        self.inputs, self.outputs = math.prod(inputs), math.prod(outputs)
        self.input_dims = len(inputs)
        self.input_name = next((INPUT_NAMES[axis] for axis in input_axes if axis in INPUT_NAMES), None)
        self.output_name = next((OUTPUT_NAMES[axis] for axis in output_axes if axis in OUTPUT_NAMES), None)
        init = init or axes.normal(self.inputs**-0.5 if std is None else std)
        self.kernel = axes.param(rngs, (*inputs, *outputs), (*input_axes, *output_axes), init)
        self.bias = axes.param(rngs, outputs, output_axes, jax.nn.initializers.zeros) if bias else None
        self.product = Product()

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = taps.tap("linear_input", x, self), self.kernel[...]
        lead = x.shape[: x.ndim - self.input_dims]
        x = x if self.input_name is None else checkpoint_name(x, self.input_name)
        # One plain matrix product: a contraction over several dimensions is slower on the CPU backend.
        y = self.product(jnp.reshape(x, (*lead, self.inputs)), jnp.reshape(kernel, (self.inputs, self.outputs)))
        y = jnp.reshape(y, (*lead, *kernel.shape[self.input_dims :]))
        y = y if self.output_name is None else checkpoint_name(y, self.output_name)
        return y if self.bias is None else y + self.bias[...]

    def flops_per_token(self) -> float:
        """Matrix product of one row: two FLOPs a multiply-add."""
        return 2.0 * self.inputs * self.outputs
