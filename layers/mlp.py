"""Dense feed-forward networks."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.context import Context
from layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "identity": lambda x: x,
}


def _check(owner: str, width: int, activation: str) -> None:
    if width < 1:
        raise ValueError(f"{owner}.width={width} must be at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{owner}.activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")


class GatedMLP(nnx.Module):
    """y = (activation(x W_gate) * x W_up) W_down: SwiGLU with "silu", GeGLU with "gelu" (Shazeer 2020, arXiv
    2002.05202), SGLU with "identity" (TransNormerLLM, arXiv 2307.14995).

    x and y: [B, T, D]. aux is empty.

    Knobs: width F >= 1; activation; bias, offsets on all three products; std of the initial weights, None for
    1 / sqrt(fan in).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"] = "silu",
        bias: bool = False,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        _check("GatedMLP", width, activation)
        self.activation = activation
        self.gate = Linear((dim,), (width,), ("embed",), ("mlp",), bias=bias, std=std, rngs=rngs)
        self.up = Linear((dim,), (width,), ("embed",), ("mlp",), bias=bias, std=std, rngs=rngs)
        self.down = Linear((width,), (dim,), ("mlp",), ("embed",), bias=bias, std=std, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        h_BTF = ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(axes.constrain(h_BTF, "batch", "length", "act_mlp")), {}

    def flops_per_token(self, length: int) -> float:
        return self.gate.flops_per_token() + self.up.flops_per_token() + self.down.flops_per_token()


class MLP(nnx.Module):
    """y = activation(x W_up) W_down (Vaswani et al. 2017); "relu2" is squared ReLU (So et al. 2021, arXiv 2109.08668).

    x and y: [B, T, D]. aux is empty.

    Knobs: width F >= 1; activation; bias, offsets on both products; std of the initial weights, None for 1 / sqrt(fan
    in).
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"] = "gelu_tanh",
        bias: bool = False,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        _check("MLP", width, activation)
        self.activation = activation
        self.up = Linear((dim,), (width,), ("embed",), ("mlp",), bias=bias, std=std, rngs=rngs)
        self.down = Linear((width,), (dim,), ("mlp",), ("embed",), bias=bias, std=std, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        h_BTF = ACTIVATIONS[self.activation](self.up(x_BTD))
        return self.down(axes.constrain(h_BTF, "batch", "length", "act_mlp")), {}

    def flops_per_token(self, length: int) -> float:
        return self.up.flops_per_token() + self.down.flops_per_token()
