"""What keeps experts evenly used: losses on the router, and rules that move its selection bias without gradients.

Every part is made with (experts, zero_experts, top_k) of its router: N experts with weights, Z without, J choices.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from layers.axes import ByProgress
from layers.routers import Routing


@dataclasses.dataclass(frozen=True)
class SignBias(ByProgress):
    """b_e += rate * sign(mean load - load of e) (Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3).

    Loads are those of the global batch. rate > 0, the update speed; recenter: keep the mean of the updates at zero,
    which changes no choice and stops a common drift; until in (0, 1]: the share of a run after which b stays as it is
    (DeepSeek-V3, arXiv 2412.19437, section 4.2: for its last 500 B of 14.8 T tokens, 0.966).
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    rate: float = 1e-3
    recenter: bool = True
    until: float = 1.0
    memory: ClassVar[int] = 0

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"SignBias.rate={self.rate} must be positive; TopK.bias=None switches the bias off")
        if not 0 < self.until <= 1:
            raise ValueError(f"SignBias.until={self.until} must lie in (0, 1], a share of the run; 1.0 never stops")

    def __call__(self, bias_E: jax.Array, counts_E: jax.Array, progress: jax.Array | float) -> jax.Array:
        step_E = self.rate * jnp.sign(jnp.mean(counts_E, -1, keepdims=True) - counts_E)
        step_E = step_E - jnp.mean(step_E, -1, keepdims=True) if self.recenter else step_E
        return bias_E + (step_E if self.until == 1 else jnp.where(progress < self.until, step_E, 0.0))

    @property
    def expected(self) -> float:
        """Experts with weights that a token visits when all are equally used."""
        return self.top_k * self.experts / (self.experts + self.zero_experts)


@dataclasses.dataclass(frozen=True)
class BudgetBias(ByProgress):
    """b_e += rate * error_e with error_e = target / (J N) - share of e in all choices, for experts with weights; zero
    experts keep b = 0 (LongCat-Flash, arXiv 2509.01322, section 2.2.1): the mean number of experts with weights per
    token settles at `target`. With all knobs a PID controller, which the report speaks of and does not print:

        b_t = proportional error_t + sum of rate_s error_s + derivative (error_t - error_(t-1))

    target in (0, top_k]; rate > 0 on the scale of probabilities, the report's mu (0.03 to 0.3 settle; 3 oscillates).
    final_rate in [0, rate]: what the rate falls to by a cosine over the run (0.01 from 0.1), None for a constant one.
    proportional, derivative >= 0. every >= 1: steps whose choices are counted together for one update of b, for small
    batches.
    Where one of the last three is not its default, the buffer has 5 rows: b, counts of the steps since the last
    update, number of those steps, errors of the last update and the one before.
    Refuses a target other than top_k where no expert is free of computation.
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    target: float
    rate: float = 0.1
    final_rate: float | None = None
    proportional: float = 0.0
    derivative: float = 0.0
    every: int = 1

    def __post_init__(self):
        _check_target("BudgetBias.target", self.target, self.zero_experts, self.top_k)
        if self.rate <= 0:
            raise ValueError(f"BudgetBias.rate={self.rate} must be positive; TopK.bias=None switches the bias off")
        if self.final_rate is not None and not 0 <= self.final_rate <= self.rate:
            raise ValueError(f"BudgetBias.final_rate={self.final_rate} must lie in [0, rate={self.rate}], or be None")
        for name, value in (("proportional", self.proportional), ("derivative", self.derivative)):
            if value < 0:
                raise ValueError(f"BudgetBias.{name}={value} must not be negative; 0.0 leaves it out")
        if self.every < 1:
            raise ValueError(f"BudgetBias.every={self.every} must be at least 1 step")

    @property
    def memory(self) -> int:
        """Rows of the buffer beside the bias."""
        return 4 if self.proportional or self.derivative or self.every > 1 else 0

    def __call__(self, value: jax.Array, statistic: jax.Array, progress: jax.Array | float) -> jax.Array:
        """value, statistic: [E], or [5, E] with the counts in the statistic's first row."""
        rate = self.rate
        if self.final_rate is not None:
            rate = self.final_rate + (self.rate - self.final_rate) * (1 + jnp.cos(jnp.pi * progress)) / 2
        if not self.memory:
            return value + rate * self._error(statistic)
        bias_E, counts_E, steps_E, last_E, before_E = (value[..., row, :] for row in range(5))
        counted = jnp.sum(statistic[..., 0, :], -1, keepdims=True) > 0
        counts_E, steps_E = counts_E + statistic[..., 0, :], steps_E + 1
        error_E = self._error(counts_E)
        bends_E = error_E - 2 * last_E + before_E
        move_E = rate * error_E + self.proportional * (error_E - last_E) + self.derivative * bends_E
        updated = jnp.stack([bias_E + move_E, 0 * counts_E, 0 * steps_E, error_E, last_E], -2)
        waiting = jnp.stack([bias_E, counts_E, steps_E, last_E, before_E], -2)
        due = counted & (steps_E >= self.every)
        return jnp.where(due[..., None, :], updated, jnp.where(counted[..., None, :], waiting, value))

    def _error(self, counts_E: jax.Array) -> jax.Array:
        """0 for zero experts. A layer that took no part in the loss has counted nothing, which says nothing about its
        experts: 0 for all of them."""
        choices = jnp.sum(counts_E, -1, keepdims=True)
        error_E = self.target / (self.top_k * self.experts) - counts_E / jnp.maximum(choices, 1.0)
        moves_E = (jnp.arange(counts_E.shape[-1]) < self.experts) & (choices > 0)
        return jnp.where(moves_E, error_E, 0.0)

    @property
    def expected(self) -> float:
        return self.target


def _check_target(knob: str, target: float, zero_experts: int, top_k: int) -> None:
    if not 0 < target <= top_k:
        raise ValueError(f"{knob}={target} must lie in (0, top_k={top_k}]")
    if zero_experts == 0 and target != top_k:
        raise ValueError(f"{knob}={target} needs zero experts: without them every token visits top_k={top_k}")


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """E * sum_e f_e P_e: f_e the share of the choices that went to expert e (no gradient), P_e the mean probability of
    e; 1 when balanced (Switch, arXiv 2101.03961, eq. 4).

    Coefficients written for the form whose minimum is top_k (Qwen2-MoE, MaxText) are to be multiplied by top_k, and
    those of a mean over layers divided by the number of layers: here the losses of layers are summed. (That of
    transformers is neither, but of all layers' tokens together: `pooled_balance.PooledBalance`.)
    coefficient > 0: 1e-2 in Switch, 1e-3 to 1e-4 beside a bias. scope: "batch" counts all tokens of the (global)
    micro-batch, "sequence" each row, then averages rows (DeepSeek-V3). There is none for the tokens of a device: the
    loss of a run would depend on its mesh.
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    coefficient: float = 1e-2
    scope: Literal["batch", "sequence"] = "batch"
    name: ClassVar[str] = "load_balance"

    def __post_init__(self):
        _check_coefficient(self)
        if self.scope not in ("batch", "sequence"):
            raise ValueError(f"LoadBalance.scope={self.scope!r} must be 'batch' or 'sequence'")

    def __call__(self, routing: Routing, real_BT: jax.Array) -> jax.Array:
        choices_BE, probability_BE, tokens_B1 = row_sums(routing, real_BT)
        if self.scope == "batch":
            choices_BE, probability_BE, tokens_B1 = (
                jnp.sum(x, 0, keepdims=True) for x in (choices_BE, probability_BE, tokens_B1)
            )
        E, J = choices_BE.shape[1], routing.index_BTJ.shape[2]
        some_B1 = jnp.maximum(tokens_B1, 1.0)
        value_B = E * jnp.sum(choices_BE / (J * some_B1) * probability_BE / some_B1, -1)
        return jnp.sum(value_B) / jnp.maximum(jnp.sum(tokens_B1 > 0), 1)


@dataclasses.dataclass(frozen=True)
class DeviceBalance:
    """sum_j f_j P_j over `groups` equal groups of experts (one a device) and one group of all zero experts (LongCat-
    Flash, section 2.2.2; without zero experts: DeepSeek-V2's device-level loss, arXiv 2405.04434, eq. 26): 1 when every
    device is equally used and a token visits `target` experts with weights on average.

    P_j: mean over tokens of the probability of group j (the gradient flows here alone). f_j: choices of group j over
    what balance would give it, counted with multiplicity.
    coefficient > 0; groups: a divisor of the experts with weights; target in (0, top_k), top_k without zero experts.
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    groups: int
    target: float
    coefficient: float = 1e-4
    name: ClassVar[str] = "device_balance"

    def __post_init__(self):
        _check_coefficient(self)
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"DeviceBalance.groups={self.groups} must divide the {self.experts} experts with weights")
        _check_target("DeviceBalance.target", self.target, self.zero_experts, self.top_k)
        if self.zero_experts and self.target == self.top_k:
            raise ValueError(f"DeviceBalance.target={self.target} leaves zero experts no choice: set it below top_k")

    def __call__(self, routing: Routing, real_BT: jax.Array) -> jax.Array:
        choices_BE, probability_BE, tokens_B1 = row_sums(routing, real_BT)
        tokens = jnp.maximum(jnp.sum(tokens_B1), 1.0)
        choices, probability = self._by_group(jnp.sum(choices_BE, 0)), self._by_group(jnp.sum(probability_BE, 0))
        balanced = [self.target / self.groups] * self.groups
        balanced += [self.top_k - self.target] if self.zero_experts else []
        return jnp.sum(choices / (jnp.asarray(balanced) * tokens) * probability / tokens)

    def _by_group(self, x_E):
        parts = [jnp.sum(jnp.reshape(x_E[: self.experts], (self.groups, -1)), 1)]
        parts += [jnp.sum(x_E[self.experts :], keepdims=True)] if self.zero_experts else []
        return jnp.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ZLoss:
    """mean over tokens of logsumexp(logits)^2, which keeps router logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    coefficient > 0: 1e-3 in the paper.
    """

    experts: int
    zero_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    coefficient: float = 1e-3
    name: ClassVar[str] = "z_loss"

    def __post_init__(self):
        _check_coefficient(self)

    def __call__(self, routing: Routing, real_BT: jax.Array) -> jax.Array:
        square_BT = jnp.square(jax.nn.logsumexp(routing.logits_BTE, -1))
        return jnp.sum(jnp.where(real_BT, square_BT, 0.0)) / jnp.maximum(jnp.sum(real_BT), 1)


def _check_coefficient(loss: "LoadBalance | DeviceBalance | ZLoss") -> None:
    if loss.coefficient <= 0:
        raise ValueError(
            f"{type(loss).__name__}.coefficient={loss.coefficient} must be positive; leave the loss out of MoE.losses "
            "for none"
        )


def count_choices(index_BTJ: jax.Array, real_BT: jax.Array, E: int) -> jax.Array:
    """Float32 [B, E]: how many real tokens of each row chose each expert."""
    chosen_BTE = jnp.sum(index_BTJ[..., None] == jnp.arange(E), -2) * real_BT[..., None]
    return jnp.sum(chosen_BTE, 1).astype(jnp.float32)


def row_sums(routing: Routing, real_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the real tokens of each row: choices of each expert [B, E] (no gradient), summed probabilities [B, E], and
    their number [B, 1]."""
    choices_BE = count_choices(routing.index_BTJ, real_BT, routing.probability_BTE.shape[2])
    probability_BE = jnp.sum(jnp.where(real_BT[..., None], routing.probability_BTE, 0.0), 1)
    return jax.lax.stop_gradient(choices_BE), probability_BE, jnp.sum(real_BT, 1, keepdims=True, dtype=jnp.float32)
