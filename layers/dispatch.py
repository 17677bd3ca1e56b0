"""Dispatch: bringing tokens to the experts that they chose, and the results back.

Letters: R tokens of all rows, J choices of each, N experts with weights; S places in front of the experts.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from layers.context import Context
from layers.experts import Experts
from layers.grouped_matmul import gather_rows, take_rows

Dispatched = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Every choice is computed: rows sorted by expert, then a grouped matrix product (MegaBlocks, arXiv 2211.15841).

    Time and memory are linear in the number of choices whatever their balance; shapes do not depend on it.
    """

    def __call__(
        self,
        experts: Experts,
        x_BTD: jax.Array,
        index_BTJ: jax.Array,
        weight_BTJ: jax.Array,
        load: float,
        ctx: Context,
    ) -> Dispatched:
        """(y_BTD, dropped): the weighted sum of the chosen experts' outputs; an index that is not in [0, N) names no
        expert. load: share of the tokens that chooses an expert when all are equally used. dropped, float32 scalar:
        choices of experts that were not computed."""
        B, T, J = index_BTJ.shape
        N, M = experts.count, B * T * J
        index_M = jnp.reshape(jnp.where((index_BTJ >= 0) & (index_BTJ < N), index_BTJ, N), -1)
        order_M = jnp.argsort(index_M, stable=True).astype(jnp.int32)
        sizes_N = jnp.sum(index_M[:, None] == jnp.arange(N), 0, dtype=jnp.int32)
        # Choices of no expert sort to the end, past the last group.
        sorted_M = jnp.arange(M, dtype=jnp.int32)
        choice_M = jnp.where(sorted_M < jnp.sum(sizes_N), order_M, M)
        place_M = jnp.zeros(M, jnp.int32).at[order_M].set(sorted_M, unique_indices=True)
        place_RJ = jnp.reshape(jnp.where(index_M < N, place_M, M), (B * T, J))
        return _send(lambda x: experts.grouped(x, sizes_N), x_BTD, weight_BTJ, choice_M, place_RJ), jnp.float32(0)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Each expert takes at most C tokens of a row, C = factor * its mean load, and drops the rest (GShard, arXiv
    2006.16668; Switch, arXiv 2101.03961). All shapes are static; a dropped choice adds nothing and the other weights
    stay as they are. Padding takes no capacity.

    First choices of all tokens are served before second ones, in the order of the tokens: what a token loses depends on
    later tokens, so in evaluation nothing is dropped unless evaluation_factor says so, and never in decoding.

    Knobs: factor > 0 in training (1.25); evaluation_factor > 0, None for dropless evaluation; minimum >= 1, the least
    C; priority: "position", or "probability" to serve tokens by their highest weight (V-MoE, arXiv 2106.05974).
    """

    _: dataclasses.KW_ONLY
    factor: float = 1.25
    evaluation_factor: float | None = None
    minimum: int = 4
    priority: Literal["position", "probability"] = "position"

    def __post_init__(self):
        for name, value in (("factor", self.factor), ("evaluation_factor", self.evaluation_factor)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Capacity.{name}={value} must be positive; 1.0 is the mean load of an expert")
        if self.minimum < 1:
            raise ValueError(f"Capacity.minimum={self.minimum} must be at least 1 token")
        if self.priority not in ("position", "probability"):
            raise ValueError(f"Capacity.priority={self.priority!r} must be 'position' or 'probability'")

    def capacity(self, length: int, load: float, factor: float) -> int:
        """Tokens of a row of `length` that one expert takes."""
        return min(max(math.ceil(length * load * factor - 1e-9), self.minimum), length)

    def __call__(
        self,
        experts: Experts,
        x_BTD: jax.Array,
        index_BTJ: jax.Array,
        weight_BTJ: jax.Array,
        load: float,
        ctx: Context,
    ) -> Dispatched:
        """As `Dropless`, but what exceeds the capacity is dropped."""
        factor = self.factor if ctx.train else self.evaluation_factor
        if ctx.decoding or factor is None:
            return Dropless()(experts, x_BTD, index_BTJ, weight_BTJ, load, ctx)
        B, T, J = index_BTJ.shape
        N = experts.count
        C = self.capacity(T, load, factor)
        wanted_BTJ = (index_BTJ >= 0) & (index_BTJ < N)
        rank_BTJ = jax.vmap(self._ranks)(jnp.where(wanted_BTJ, index_BTJ, N), weight_BTJ)
        row_B11 = jnp.arange(B, dtype=jnp.int32)[:, None, None]
        places = N * B * C
        kept_BTJ = wanted_BTJ & (rank_BTJ < C)
        place_BTJ = jnp.where(kept_BTJ, (index_BTJ * B + row_B11) * C + rank_BTJ, places)
        choices_M = jnp.arange(B * T * J, dtype=jnp.int32)
        choice_S = jnp.full(places, B * T * J, jnp.int32)
        choice_S = choice_S.at[jnp.reshape(place_BTJ, -1)].set(choices_M, mode="drop")

        def run(x_SD):
            return jnp.reshape(experts(jnp.reshape(x_SD, (N, B * C, -1))), (places, -1))

        y_BTD = _send(run, x_BTD, weight_BTJ, choice_S, jnp.reshape(place_BTJ, (B * T, J)))
        return y_BTD, jnp.sum(wanted_BTJ & ~kept_BTJ).astype(jnp.float32)

    def _ranks(self, index_TJ, weight_TJ):
        """How many choices of the same expert are served before each one."""
        T, J = index_TJ.shape
        served_T = jnp.arange(T)
        if self.priority == "probability":
            served_T = jnp.argsort(-weight_TJ[:, 0], stable=True)
        index_M = jnp.reshape(index_TJ[served_T].T, -1)  # all first choices, then all second ones
        order_M = jnp.argsort(index_M, stable=True)
        sorted_M = index_M[order_M]
        start_M = jnp.searchsorted(sorted_M, sorted_M, side="left")
        rank_M = jnp.zeros(T * J, jnp.int32).at[order_M].set((jnp.arange(T * J) - start_M).astype(jnp.int32))
        return jnp.zeros((T, J), jnp.int32).at[served_T].set(jnp.reshape(rank_M, (J, T)).T)


def _send(run, x_BTD, weight_BTJ, choice_S, place_RJ):
    """Rows to their places, through `run`, and back as weighted sums."""
    B, T, D = x_BTD.shape
    J = weight_BTJ.shape[2]
    token_S = jnp.where(choice_S < B * T * J, choice_S // J, B * T)
    y_SD = run(take_rows(jnp.reshape(x_BTD, (B * T, D)), token_S, place_RJ))
    y_RD = combine(y_SD, jnp.reshape(weight_BTJ, (B * T, J)).astype(jnp.float32), choice_S, place_RJ)
    return jnp.reshape(y_RD, (B, T, D))


@jax.custom_vjp
def combine(y_SD: jax.Array, weight_RJ: jax.Array, choice_S: jax.Array, place_RJ: jax.Array) -> jax.Array:
    """sum_j weight_RJ * y_SD[place_RJ], added up in float32: [R, D] of y's dtype.

    place_RJ and choice_S (an index into the R J choices) are each other's inverse; an index out of range stands for
    nothing. Never holds an array of R J rows of its own, and its backward pass only gathers.
    """
    return _combine(y_SD, weight_RJ, place_RJ)


def _combine(y_SD, weight_RJ, place_RJ):
    parts = (
        weight_RJ[:, j, None] * gather_rows(y_SD, place_RJ[:, j]).astype(jnp.float32) for j in range(place_RJ.shape[1])
    )
    return sum(parts).astype(y_SD.dtype)


def _combine_forward(y_SD, weight_RJ, choice_S, place_RJ):
    return _combine(y_SD, weight_RJ, place_RJ), (y_SD, weight_RJ, choice_S, place_RJ)


def _combine_backward(residuals, g_RD):
    y_SD, weight_RJ, choice_S, place_RJ = residuals
    R, J = weight_RJ.shape
    token_S = jnp.where(choice_S < R * J, choice_S // J, R)
    weight_S = gather_rows(jnp.reshape(weight_RJ, (-1, 1)), choice_S)
    g_SD = gather_rows(g_RD, token_S).astype(jnp.float32)
    dweight_S = jnp.sum(g_SD * y_SD.astype(jnp.float32), 1, keepdims=True)
    dweight_RJ = jnp.reshape(gather_rows(dweight_S, jnp.reshape(place_RJ, -1)), (R, J))
    return (weight_S * g_SD).astype(y_SD.dtype), dweight_RJ, None, None


combine.defvjp(_combine_forward, _combine_backward)
