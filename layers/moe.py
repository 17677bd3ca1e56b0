"""A mixture of experts as a feed-forward."""

import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.balance import LoadBalance, count_choices
from layers.context import Context
from layers.dispatch import Dropless
from layers.pooled_balance import PooledBalance
from layers.routers import Routing
from layers.selection import real_tokens


class MoE(nnx.Module):
    """y = sum over the chosen experts of weight * expert(x), plus a shared feed-forward that every token passes.

    x and y: [B, T, D]. Padding (segment 0, or past a row's length while decoding) is not routed: it counts for no
    balance and takes no capacity. aux, float32 scalars: "loss", the sum of the losses with their coefficients;
    each loss under its own name without its coefficient; "load", largest over mean number of tokens of an expert with
    weights; "dropped", share of the choices of such experts that were not computed; "entropy" of the router in nats;
    "ffn_experts" and "ffn_experts_std", experts with weights that a token visits; "flops_per_token", forward matrix
    products as routed; "bias", the largest |selection bias|.

    Knobs:
        router: factory such as routers.TopK. experts: factory of experts.Experts, all of one shape.
        zero_experts: factory of zero_experts.ZeroExperts, or None. They take the router's last places.
        shared: factory of a feed-forward that all tokens pass, or None; shared_gate: its output times
        sigmoid(x w), one number a token (Qwen2-MoE).
        dispatch: factory, dispatch.Dropless or dispatch.Capacity.
        losses: factories of balance.LoadBalance, DeviceBalance, ZLoss, whose sum is over layers, too, and of
        pooled_balance.PooledBalance, one loss for all layers.
    Refuses a shared_gate without shared. Warns where a selection bias meets a LoadBalance or PooledBalance whose
    coefficient is 1e-2 or more: the two pull against each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        router: Callable,
        experts: Callable,
        zero_experts: Callable | None = None,
        shared: Callable | None = None,
        shared_gate: bool = False,
        dispatch: Callable = Dropless,
        losses: tuple[Callable, ...] = (),
        rngs: nnx.Rngs,
    ):
        if shared_gate and shared is None:
            raise ValueError("MoE.shared_gate=True needs MoE.shared: there is no shared feed-forward to gate")
        self.experts = experts(dim, rngs=rngs)
        self.zero_experts = None if zero_experts is None else zero_experts(dim, rngs=rngs)
        N, Z = self.experts.count, 0 if zero_experts is None else self.zero_experts.count
        self.router = router(dim, N, Z, rngs=rngs)
        self.shared = None if shared is None else shared(dim, rngs=rngs)
        self.shared_gate = axes.param(rngs, (dim,), ("embed",)) if shared_gate else None
        self.dispatch = dispatch()
        self.losses = tuple(loss(N, Z, self.router.top_k) for loss in losses)
        strong = [x for x in self.losses if isinstance(x, LoadBalance | PooledBalance) and x.coefficient >= 1e-2]
        if strong and self.router.bias is not None:
            knob = f"{type(strong[0]).__name__}.coefficient={strong[0].coefficient}"
            warnings.warn(
                f"{knob} beside TopK.bias: the loss will do the balancing; lower it to about 1e-4, or leave one of "
                "them out",
                stacklevel=2,
            )

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        real_BT = real_tokens(ctx)
        routing = self.router(x_BTD, ctx)
        N = self.experts.count
        # Padding chooses no expert at all; its index lies past the last zero expert.
        index_BTJ = jnp.where(real_BT[..., None], routing.index_BTJ, routing.logits_BTE.shape[2])
        load = self.router.expected / N
        y_BTD, dropped = self.dispatch(self.experts, x_BTD, index_BTJ, routing.weight_BTJ, load, ctx)
        if self.zero_experts is not None:
            y_BTD = y_BTD + self.zero_experts(x_BTD, index_BTJ - N, routing.weight_BTJ)
        aux, shared_losses = self._telemetry(routing, real_BT, dropped), []
        if self.shared is not None:
            shared_BTD, shared_aux = self.shared(x_BTD, ctx)
            if self.shared_gate is not None:
                shared_BTD = shared_BTD * jax.nn.sigmoid(x_BTD @ self.shared_gate[...])[..., None]
            y_BTD = y_BTD + shared_BTD
            shared_losses = [shared_aux["loss"]] if "loss" in shared_aux else []
            aux |= {f"shared/{name}": value for name, value in shared_aux.items() if name != "loss"}
        own = [loss for loss in self.losses if not isinstance(loss, PooledBalance)]
        losses = {loss.name: loss(routing, real_BT) for loss in own}
        weighted = [loss.coefficient * losses[loss.name] for loss in own] + shared_losses
        aux |= losses | ({"loss": sum(weighted)} if weighted else {})
        for pooled in (loss for loss in self.losses if isinstance(loss, PooledBalance)):
            aux |= pooled.report(routing, real_BT)
        counts_E = jnp.sum(count_choices(routing.index_BTJ, real_BT, routing.logits_BTE.shape[2]), 0)
        return self.router.report(y_BTD, counts_E), aux

    def _telemetry(self, routing: Routing, real_BT: jax.Array, dropped: jax.Array) -> dict[str, jax.Array]:
        N, E = self.experts.count, routing.logits_BTE.shape[2]
        tokens = jnp.maximum(jnp.sum(real_BT), 1).astype(jnp.float32)
        counts_N = jnp.sum(count_choices(routing.index_BTJ, real_BT, E), 0)[:N]
        choices = jnp.maximum(jnp.sum(counts_N), 1.0)
        visited_BT = jnp.sum((routing.index_BTJ < N) & real_BT[..., None], -1).astype(jnp.float32)
        mean = jnp.sum(visited_BT) / tokens
        variance = jnp.sum(jnp.where(real_BT, jnp.square(visited_BT - mean), 0.0)) / tokens
        entropy_BT = -jnp.sum(jax.scipy.special.xlogy(routing.probability_BTE, routing.probability_BTE), -1)
        computed = mean - dropped / tokens
        aux = {
            "load": jnp.max(counts_N) * N / choices,
            "dropped": dropped / choices,
            "entropy": jnp.sum(jnp.where(real_BT, entropy_BT, 0.0)) / tokens,
            "ffn_experts": mean,
            "ffn_experts_std": jnp.sqrt(variance),
            "flops_per_token": self._flops_around(real_BT.shape[1]) + self.experts.flops_per_row * computed,
        }
        if self.router.bias is not None:
            aux["bias"] = jnp.max(jnp.abs(self.router.selection_bias()))
        return {name: jax.lax.stop_gradient(value) for name, value in aux.items()}

    def _flops_around(self, length: int) -> float:
        """Of everything but the experts with weights."""
        zero = 0.0 if self.zero_experts is None else self.zero_experts.flops_per_token
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(length)
        gate = 0.0 if self.shared_gate is None else 2.0 * self.experts.dim
        return self.router.flops_per_token + zero + shared + gate

    def idle_parameters(self) -> float:
        return self.experts.idle_parameters(self.router.expected)

    def flops_per_token(self, length: int) -> float:
        """Active FLOPs: the experts that a token visits, not those that there are; with zero experts the expected
        number of the former."""
        return self._flops_around(length) + self.router.expected * self.experts.flops_per_row
