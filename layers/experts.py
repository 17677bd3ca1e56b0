"""Experts: many gated feed-forward networks of one shape, each applied to rows of its own."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from layers import axes, kernels
from layers.grouped_matmul import in_groups
from layers.mlp import ACTIVATIONS

AXES = {"gate": ("experts", "embed", "mlp"), "up": ("experts", "embed", "mlp"), "down": ("experts", "mlp", "embed")}
Weights = dict[str, jax.Array]


class Experts(nnx.Module):
    """y = (activation(x W_gate[e]) * x W_up[e]) W_down[e] for the rows x that were sent to expert e.

    Fine-grained experts (DeepSeekMoE, arXiv 2401.06066) are the same with a larger count and a smaller width.

    Knobs: count E >= 1; width F >= 1 of one expert; activation; std of the initial weights, None for 1 / sqrt(fan in)
    of one expert.
    """

    def __init__(
        self,
        dim: int,
        *,
        count: int,
        width: int,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu",
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in (("count", count), ("width", width)):
            if value < 1:
                raise ValueError(f"Experts.{name}={value} must be at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"Experts.activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        if std is not None and std <= 0:
            raise ValueError(f"Experts.std={std} must be positive, or None for 1/sqrt(fan in)")
        self.count, self.dim, self.width, self.activation = count, dim, width, activation
        self.note: tuple[str, str] | None = None  # for the start table: how these products are computed, and why
        into = axes.normal(dim**-0.5 if std is None else std)
        self.gate = axes.param(rngs, (count, dim, width), AXES["gate"], into)
        self.up = axes.param(rngs, (count, dim, width), AXES["up"], into)
        out = axes.normal(width**-0.5 if std is None else std)
        self.down = axes.param(rngs, (count, width, dim), AXES["down"], out)

    @property
    def weights(self) -> Weights:
        """Of all experts: gate and up [E, D, F], down [E, F, D]."""
        return {"gate": self.gate[...], "up": self.up[...], "down": self.down[...]}

    def _network(self, product, x, weights):
        if self.note is not None:
            kernels.take("products", *self.note)
        gate, up = (checkpoint_name(product(x, weights[name]), "mlp_up") for name in ("gate", "up"))
        return product(ACTIVATIONS[self.activation](gate) * up, weights["down"])

    def __call__(self, x_ECD: jax.Array, weights: Weights | None = None) -> jax.Array:
        """C rows for each expert: [E, C, D] -> [E, C, D]. weights: those of the experts that are here, None for all."""
        return self._network(jnp.matmul, x_ECD, self.weights if weights is None else weights)

    def grouped(self, x_MD: jax.Array, sizes_E: jax.Array, weights: Weights | None = None) -> jax.Array:
        """Rows sorted by expert, sizes_E (int32) of them for each: [M, D] -> [M, D]. weights: as above.

        Nothing is dropped and nothing is padded to the largest group. Rows past the sum of sizes_E come back as zeros.
        """
        weights = self.weights if weights is None else weights
        return in_groups(x_MD, sizes_E, lambda product, x: self._network(product, x, weights))

    @property
    def flops_per_row(self) -> float:
        """Matrix products of one row through one expert: two FLOPs a multiply-add."""
        return 6.0 * self.dim * self.width

    def idle_parameters(self, visited: float) -> float:
        """Parameters of the experts that a token does not visit, where it visits `visited` of them on average."""
        return (self.gate.size + self.up.size + self.down.size) * (self.count - visited) / self.count
