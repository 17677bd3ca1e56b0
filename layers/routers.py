"""Routers: which experts each token goes to, and with what weight.

Letters here: J choices of a token, E all experts (those with weights first, then the zero-computation ones).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes
from layers.context import Context
from layers.remat import chosen
from layers.selection import by_device


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index_BTJ", "weight_BTJ", "probability_BTE", "logits_BTE"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """The chosen experts (int32, best first, distinct) and their weights; each token's distribution over all experts
    (what balance losses see) and the logits, float32."""

    index_BTJ: jax.Array
    weight_BTJ: jax.Array
    probability_BTE: jax.Array
    logits_BTE: jax.Array


@dataclasses.dataclass(frozen=True)
class GroupLimit:
    """Only the best `top_groups` of `groups` equal groups of experts may be chosen from (DeepSeek-V3, arXiv
    2412.19437): a token then visits few devices. A group's score is the sum of its `best` highest selection scores:
    2 in DeepSeek-V3, 1 in V2.

    Refuses groups that do not divide the experts, and too few experts left for top_k.
    """

    experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    groups: int
    top_groups: int
    best: int = 2

    def __post_init__(self):
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"GroupLimit.groups={self.groups} must divide the {self.experts} experts of the router")
        size = self.experts // self.groups
        if not 1 <= self.top_groups <= self.groups or self.top_groups * size < self.top_k:
            raise ValueError(
                f"GroupLimit.top_groups={self.top_groups} must lie in 1..{self.groups} and leave at least "
                f"top_k={self.top_k} experts, {size} a group"
            )
        if not 1 <= self.best <= size:
            raise ValueError(f"GroupLimit.best={self.best} must lie in 1..{size}, the experts of a group")

    def __call__(self, score_BTE: jax.Array) -> jax.Array:
        """The selection scores, -inf outside the kept groups."""
        grouped = jnp.reshape(score_BTE, (*score_BTE.shape[:-1], self.groups, -1))
        group_score = jnp.sum(jax.lax.top_k(grouped, self.best)[0], -1)
        kept = jax.lax.top_k(group_score, self.top_groups)[1]
        open_ = jnp.any(kept[..., None] == jnp.arange(self.groups), -2)
        return jnp.reshape(jnp.where(open_[..., None], grouped, -jnp.inf), score_BTE.shape)


class TopK(nnx.Module):
    """Token choice: each token goes to the top_k experts of the highest score (Shazeer et al. 2017, arXiv 1701.06538).

    logits = x W in float32 at the highest precision; s = softmax(logits) over all experts or sigmoid(logits); the
    choice is top_k(s + bias), ties to the lower index; the weights are s of the chosen, never with the bias.

    x: [B, T, D] -> Routing. `experts` with weights come first, then `zero_experts` without.
    Knobs:
        top_k: choices of a token, 1 .. all experts. score.
        norm_topk: divide the weights by their sum: for softmax scores this is the softmax over the chosen logits alone
        (Mixtral). None: yes for sigmoid (DeepSeek-V3), no for softmax (Qwen2-MoE, LongCat).
        scale > 0: factor of all weights. Experts split m-fold in count and width keep the output's variance with
        scale m (LongCat-Flash, arXiv 2509.01322, section 2.3) where norm_topk is off and Experts.std is set; with
        Experts.std = None, which draws narrower experts' last weights wider, with m^0.5.
        limit: factory such as GroupLimit of what may be chosen, or None.
        bias: factory of a rule such as balance.SignBias that moves a selection bias without gradients, or None. One
        with a memory keeps it in further rows of the bias's buffer.
        jitter: in training, the input of the router times uniform(1 - jitter, 1 + jitter) (Switch), 0 <= jitter < 1.
        std: standard deviation of the initial weight, None for 1 / sqrt(D).
    Refuses a top_k above the number of experts, and jitter without randomness in the context.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        zero_experts: int = 0,
        *,
        top_k: int,
        score: Literal["softmax", "sigmoid"] = "softmax",
        norm_topk: bool | None = None,
        scale: float = 1.0,
        limit: Callable | None = None,
        bias: Callable | None = None,
        jitter: float = 0.0,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        E = experts + zero_experts
        if not 1 <= top_k <= E:
            raise ValueError(f"TopK.top_k={top_k} must lie in 1..{E}, the number of experts")
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"TopK.score={score!r} must be 'softmax' or 'sigmoid'")
        if scale <= 0:
            raise ValueError(f"TopK.scale={scale} must be positive; 1.0 leaves the weights alone")
        if not 0 <= jitter < 1:
            raise ValueError(f"TopK.jitter={jitter} must lie in [0, 1)")
        if std is not None and std <= 0:
            raise ValueError(f"TopK.std={std} must be positive, or None for 1/sqrt(D)")
        self.top_k, self.score, self.scale, self.jitter = top_k, score, scale, jitter
        self.norm_topk = score == "sigmoid" if norm_topk is None else norm_topk
        self.limit = None if limit is None else limit(E, top_k)
        init = axes.normal(dim**-0.5 if std is None else std)
        self.kernel = axes.param(rngs, (dim, E), ("embed", "routed"), init, exact=True)
        rule = None if bias is None else bias(experts, zero_experts, top_k)
        self.memory = 0 if rule is None else rule.memory
        shape, names = ((1 + self.memory, E), (None, "routed")) if self.memory else ((E,), ("routed",))
        self.bias = None if rule is None else axes.buffer(jnp.zeros(shape), names, rule)
        # Experts with weights that a token is expected to visit: what FLOPs are stated by.
        self.expected = top_k * experts / E if rule is None else rule.expected
        self.flops_per_token = 2.0 * dim * E

    def selection_bias(self) -> jax.Array | float:
        """Float32 [E], without a gradient."""
        if self.bias is None:
            return 0.0
        value = jax.lax.stop_gradient(self.bias[...].astype(jnp.float32))
        return value[0] if self.memory else value

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> Routing:
        x_BTD = x_BTD.astype(jnp.float32)
        if self.jitter and ctx.train:
            if ctx.key is None:
                raise ValueError(f"TopK.jitter={self.jitter} needs randomness: Context.key is None in a training call")
            x_BTD = x_BTD * jax.random.uniform(ctx.key, x_BTD.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        logits_BTE = jnp.matmul(x_BTD, self.kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        if self.score == "softmax":
            score_BTE = probability_BTE = jax.nn.softmax(logits_BTE)
        else:
            score_BTE = jax.nn.sigmoid(logits_BTE)
            probability_BTE = score_BTE / jnp.sum(score_BTE, -1, keepdims=True)
        selection_BTE = jax.lax.stop_gradient(score_BTE) + self.selection_bias()
        index_BTJ = chosen(by_device(self._best, selection_BTE, "batch", "length"))
        weight_BTJ = jnp.take_along_axis(score_BTE, index_BTJ, -1)
        if self.norm_topk:
            weight_BTJ = weight_BTJ / (jnp.sum(weight_BTJ, -1, keepdims=True) + 1e-20)
        return Routing(index_BTJ, weight_BTJ * self.scale, probability_BTE, logits_BTE)

    def _best(self, selection_BTE: jax.Array) -> jax.Array:
        if self.limit is not None:
            selection_BTE = self.limit(selection_BTE)
        return jax.lax.top_k(selection_BTE, self.top_k)[1]

    def report(self, y_BTD: jax.Array, counts_E: jax.Array) -> jax.Array:
        """y itself; tells the rule of the bias how many tokens each expert was chosen by."""
        if self.bias is None:
            return y_BTD
        statistic = jnp.pad(counts_E[None], ((0, self.memory), (0, 0))) if self.memory else counts_E
        return axes.measure(y_BTD, self.bias[...], statistic)
