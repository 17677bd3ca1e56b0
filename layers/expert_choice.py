"""Expert choice: experts choose tokens, not tokens experts."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.context import Context, ReadsFuture
from layers.dispatch import serve, serve_tokens
from layers.expert_parallel import whole_on_devices
from layers.remat import chosen
from layers.selection import by_device, marked, real_tokens


class ExpertChoice(nnx.Module, ReadsFuture):
    """Each expert takes the C tokens of a row that score highest for it (Zhou et al. 2022, arXiv 2202.09368): perfect
    balance without a loss; a token visits between none and all experts.

    s = softmax over experts of x W in float32; y = sum of s * expert(x) over the experts that took the token, plus the
    shared feed-forward. x and y: [B, T, D]. Padding is never taken. aux, float32 scalars: "unserved", share of the
    tokens that no expert took; "load", largest over mean number of tokens of an expert (all alike but in rows with less
    tokens than places); "dropped", share of the choices that were not computed, 0 here: the choices are the experts';
    "entropy" of the router in nats; "ffn_experts", experts that a token visits on average; "flops_per_token", forward
    matrix products as routed.

    Whether a token is taken depends on the tokens after it. That leaks the future into next-token training and cannot
    be had while decoding, so it must be asked for: it suits encoders.
    Knobs: experts: factory of experts.Experts. capacity_factor > 0, at most the number of experts: mean experts a token
    visits; C = ceil(T * capacity_factor / E). shared: factory of a feed-forward that all tokens pass, or None.
    allow_noncausal: True says that the model may read the future. std of the router, None for 1 / sqrt(D).
    Refuses to exist without allow_noncausal, and to decode.
    """

    def __init__(
        self,
        dim: int,
        *,
        experts: Callable,
        capacity_factor: float = 2.0,
        shared: Callable | None = None,
        allow_noncausal: bool = False,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        if not allow_noncausal:
            raise ValueError(
                "ExpertChoice.allow_noncausal=False: experts that choose among the tokens of a row read its future; "
                "use routers.TopK for a causal model, or set it to True for an encoder"
            )
        self.experts = experts(dim, rngs=rngs)
        E = self.experts.count
        if not 0 < capacity_factor <= E:
            raise ValueError(f"ExpertChoice.capacity_factor={capacity_factor} must lie in (0, {E}], the experts")
        if std is not None and std <= 0:
            raise ValueError(f"ExpertChoice.std={std} must be positive, or None for 1/sqrt(D)")
        self.capacity_factor = capacity_factor
        init = axes.normal(dim**-0.5 if std is None else std)
        self.kernel = axes.param(rngs, (dim, E), ("embed", "routed"), init, exact=True)
        self.shared = None if shared is None else shared(dim, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        if ctx.decoding:
            self.check_decoding()
        B, T, _ = x_BTD.shape
        C = self._capacity(T)
        real_BT = real_tokens(ctx)
        kernel_DE = self.kernel[...].astype(jnp.float32)
        logits_BTE = jnp.matmul(x_BTD.astype(jnp.float32), kernel_DE, precision=jax.lax.Precision.HIGHEST)
        score_BTE = jax.nn.softmax(logits_BTE)
        wanted_BET = jnp.where(real_BT[..., None], score_BTE, -1.0).swapaxes(1, 2)
        # Experts choose in whole rows, wherever the tokens of a row lie.
        token_BEC = chosen(
            by_device(lambda wanted: jax.lax.top_k(wanted, C)[1], jax.lax.stop_gradient(wanted_BET), "batch")
        )
        weight_BEC = jnp.take_along_axis(wanted_BET, token_BEC, -1)
        token_BEC = jnp.where(weight_BEC > 0, token_BEC, T)  # padding that filled up a short row is nobody
        taken_BET = marked(token_BEC, token_BEC < T, T)
        if whole_on_devices(B):
            y_BTD = serve(self.experts, x_BTD, token_BEC, jnp.maximum(weight_BEC, 0.0))
        else:
            y_BTD = serve_tokens(self.experts, x_BTD, taken_BET.swapaxes(1, 2), score_BTE)
        y_BTD = y_BTD.astype(x_BTD.dtype)
        aux = self._telemetry(score_BTE, taken_BET, real_BT)
        if self.shared is not None:
            shared_BTD, shared_aux = self.shared(x_BTD, ctx)
            y_BTD = y_BTD + shared_BTD
            aux |= {name if name == "loss" else f"shared/{name}": value for name, value in shared_aux.items()}
        return y_BTD, aux

    def _capacity(self, length: int) -> int:
        return max(min(math.ceil(length * self.capacity_factor / self.experts.count - 1e-9), length), 1)

    def _telemetry(self, score_BTE, taken_BET, real_BT):
        tokens = jnp.maximum(jnp.sum(real_BT), 1)
        visits_BT, load_E = jnp.sum(taken_BET, 1), jnp.sum(taken_BET, (0, 2)).astype(jnp.float32)
        visits = jnp.sum(load_E) / tokens
        entropy_BT = -jnp.sum(jax.scipy.special.xlogy(score_BTE, score_BTE), -1)
        aux = {
            "unserved": jnp.sum(real_BT & (visits_BT == 0)) / tokens,
            "load": jnp.max(load_E) / jnp.maximum(jnp.mean(load_E), 1.0),
            "dropped": jnp.zeros(()),
            "entropy": jnp.sum(jnp.where(real_BT, entropy_BT, 0.0)) / tokens,
            "ffn_experts": visits,
            "flops_per_token": self._flops_around(real_BT.shape[1]) + visits * self.experts.flops_per_row,
        }
        return {name: jax.lax.stop_gradient(value) for name, value in aux.items()}

    def idle_parameters(self) -> float:
        return self.experts.idle_parameters(self.capacity_factor)

    def _flops_around(self, length: int) -> float:
        """Of the router and the shared feed-forward."""
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(length)
        return 2.0 * self.experts.dim * self.experts.count + shared

    def flops_per_token(self, length: int) -> float:
        visited = self._capacity(length) * self.experts.count / length
        return self._flops_around(length) + visited * self.experts.flops_per_row
