"""Dispatch: bringing tokens to the experts that they chose, and the results back.

Letters: R tokens of all rows, J choices of each, N experts with weights; S places in front of the experts.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from layers import axes
from layers.context import Context
from layers.expert_parallel import Exchange, LocalExperts, on_each_device, whole_on_devices
from layers.experts import Experts
from layers.grouped_matmul import gather_rows, take_rows

Dispatched = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Every choice is computed: rows sorted by expert, then a grouped matrix product (MegaBlocks, arXiv 2211.15841).

    Time and memory are linear in the number of choices whatever their balance; shapes do not depend on it. Under a mesh
    each device sorts its own tokens. Where experts are spread over P devices, E of them on each, rows are exchanged
    between the devices, R tokens on each:

    Knobs:
        exchange: "all_to_all" sends rows to the devices of their experts. Every pair of devices has room for the worst
            case, R min(J, E) rows, so that nothing is dropped: memory, and rows on the wire, are up to P times the
            balanced ones. "gather" brings all tokens of the P devices to each of them and adds up the results there:
            R (P - 1) rows each way, min(J, E) times fewer, and nothing depends on balance.
        room: in training, room of a pair of devices in units of the balanced load, > 0 (2.0 is usual); what finds none
            is dropped and counted. With it all_to_all sends room R J (P - 1) / P rows each way, fewer than gather where
            room J < P. None for the worst case.
    Refuses room with "gather", which needs none.
    """

    _: dataclasses.KW_ONLY
    exchange: Exchange = "all_to_all"
    room: float | None = None

    def __post_init__(self):
        if self.exchange not in ("all_to_all", "gather"):
            raise ValueError(f"Dropless.exchange={self.exchange!r} must be 'all_to_all' or 'gather'")
        if self.room is not None and not 0 < self.room < math.inf:
            raise ValueError(f"Dropless.room={self.room} must be positive, or None to drop nothing; 1.0 is balanced")
        if self.room is not None and self.exchange == "gather":
            raise ValueError(
                f"Dropless.room={self.room} is for exchange 'all_to_all': 'gather' has room for everything"
            )

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
        bounded = ctx.train and not ctx.decoding

        def run(experts: LocalExperts, x_BTD, index_BTJ, weight_BTJ):
            B, T, J = index_BTJ.shape
            room = self.places(B * T, J, load, experts.here, bounded and experts.parts > 1)
            return _by_expert(experts, x_BTD, index_BTJ - experts.first, weight_BTJ, room)

        return on_each_device(run, experts, x_BTD, index_BTJ, weight_BTJ, exchange=self.exchange)

    def places(self, tokens: float, choices: int, load: float, here: int, bounded: bool = True) -> float:
        """Rows for which a device with `here` experts has room, of so many tokens of another device that choose so
        often; whole where tokens are. bounded: by `room`, else for the worst case."""
        worst = tokens * min(choices, here)
        if self.room is None or not bounded:
            return worst
        return min(worst, math.ceil(self.room * tokens * load * here - 1e-9))


def _by_expert(experts: LocalExperts, x_BTD, index_BTJ, weight_BTJ, room: int) -> Dispatched:
    """Choices in the order of experts; each device that holds experts gets `room` places."""
    B, T, J = index_BTJ.shape
    N, P, M = experts.count, experts.parts, B * T * J
    index_M = jnp.reshape(jnp.where((index_BTJ >= 0) & (index_BTJ < N), index_BTJ, N), -1)
    order_M = jnp.argsort(index_M, stable=True).astype(jnp.int32)
    sorted_M = jnp.arange(M, dtype=jnp.int32)
    rank_M = jnp.zeros(M, jnp.int32).at[order_M].set(sorted_M, unique_indices=True)
    sizes_PE = jnp.reshape(jnp.sum(index_M[:, None] == jnp.arange(N), 0, dtype=jnp.int32), (P, -1))
    total_P = jnp.sum(sizes_PE, 1)
    start_P = jnp.cumsum(total_P) - total_P
    # A device's places hold its choices in order; those of no expert have sorted to the end, past the last device's.
    place_C = jnp.arange(room, dtype=jnp.int32)
    choice_PC = gather_rows(order_M, start_P[:, None] + place_C)
    choice_S = jnp.reshape(jnp.where(place_C < total_P[:, None], choice_PC, M), -1)
    part_M = jnp.minimum(index_M // experts.here, P - 1)
    within_M = rank_M - start_P[part_M]
    place_M = jnp.where((index_M < N) & (within_M < room), part_M * room + within_M, P * room)
    ends_PE = jnp.cumsum(sizes_PE, 1)
    fit_PE = jnp.minimum(ends_PE, room) - jnp.minimum(ends_PE - sizes_PE, room)
    dropped = jnp.sum(sizes_PE) - jnp.sum(fit_PE)
    place_RJ = jnp.reshape(place_M, (B * T, J))
    y_BTD = _send(lambda x_SD: experts.sorted(x_SD, fit_PE), x_BTD, weight_BTJ, choice_S, place_RJ)
    return y_BTD, dropped.astype(jnp.float32)


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
        B, T, _ = index_BTJ.shape
        C = self.capacity(T, load, factor)
        if whole_on_devices(B):
            return on_each_device(functools.partial(self._by_place, C=C), experts, x_BTD, index_BTJ, weight_BTJ)
        # Rows lie on several devices each: who is served is decided by whole rows, the served go as with Dropless.
        rows = (axes.constrain(x, "batch", None, None) for x in (index_BTJ, weight_BTJ))
        wanted_BTJ, kept_BTJ, _ = self._served(*rows, experts.count, C, ctx.order_BT)
        index_BTJ = jnp.where(kept_BTJ, index_BTJ, experts.count)
        y_BTD, _ = Dropless()(experts, x_BTD, index_BTJ, weight_BTJ, load, ctx)
        return y_BTD, jnp.sum(wanted_BTJ & ~kept_BTJ).astype(jnp.float32)

    def _by_place(self, experts: LocalExperts, x_BTD, index_BTJ, weight_BTJ, *, C: int) -> Dispatched:
        """C places for each row and expert."""
        B, T, J = index_BTJ.shape
        N = experts.count
        index_BTJ = index_BTJ - experts.first
        wanted_BTJ, kept_BTJ, rank_BTJ = self._served(index_BTJ, weight_BTJ, N, C)
        row_B11 = jnp.arange(B, dtype=jnp.int32)[:, None, None]
        places = N * B * C
        place_BTJ = jnp.where(kept_BTJ, (index_BTJ * B + row_B11) * C + rank_BTJ, places)
        choices_M = jnp.arange(B * T * J, dtype=jnp.int32)
        choice_S = jnp.full(places, B * T * J, jnp.int32)
        choice_S = choice_S.at[jnp.reshape(place_BTJ, -1)].set(choices_M, mode="drop")

        def run(x_SD):
            return jnp.reshape(experts.equal(jnp.reshape(x_SD, (N, B * C, -1))), (places, -1))

        y_BTD = _send(run, x_BTD, weight_BTJ, choice_S, jnp.reshape(place_BTJ, (B * T, J)))
        return y_BTD, jnp.sum(wanted_BTJ & ~kept_BTJ).astype(jnp.float32)

    def _served(self, index_BTJ, weight_BTJ, N, C, order_BT=None):
        """(choices of experts, those that are served, how many of the same expert and row are served before each)."""
        wanted_BTJ = (index_BTJ >= 0) & (index_BTJ < N)
        ranks = jax.vmap(self._ranks, in_axes=(0, 0, None if order_BT is None else 0))
        rank_BTJ = ranks(jnp.where(wanted_BTJ, index_BTJ, N), weight_BTJ, order_BT)
        return wanted_BTJ, wanted_BTJ & (rank_BTJ < C), rank_BTJ

    def _ranks(self, index_TJ, weight_TJ, order_T):
        """How many choices of the same expert are served before each one. order_T: places of the tokens in the row."""
        T, J = index_TJ.shape
        served_T = jnp.arange(T) if order_T is None else jnp.argsort(order_T)
        if self.priority == "probability":
            served_T = served_T[jnp.argsort(-weight_TJ[served_T, 0], stable=True)]
        index_M = jnp.reshape(index_TJ[served_T].T, -1)  # all first choices, then all second ones
        order_M = jnp.argsort(index_M, stable=True)
        sorted_M = index_M[order_M]
        start_M = jnp.searchsorted(sorted_M, sorted_M, side="left")
        rank_M = jnp.zeros(T * J, jnp.int32).at[order_M].set((jnp.arange(T * J) - start_M).astype(jnp.int32))
        return jnp.zeros((T, J), jnp.int32).at[served_T].set(jnp.reshape(rank_M, (J, T)).T)


def serve(experts: Experts, x_SND: jax.Array, index_SEC: jax.Array, weight_SEC: jax.Array) -> jax.Array:
    """Experts that have chosen tokens: float32 [S, N, D], the sum over experts e and places c of weight_SEC times
    e(x_SND[index_SEC]) at that token. An index of N leaves a place empty.

    x_SND: S groups of N tokens in which experts choose, in the order of rows. Under a mesh each device must hold whole
    groups (`expert_parallel.whole_on_devices`); a group that lies on several devices is for `serve_tokens`.
    """

    def run(experts: LocalExperts, x_SND, index_SEC, weight_SEC):
        S, N, D = x_SND.shape
        E, C = experts.count, index_SEC.shape[2]
        if index_SEC.shape[1] > E:
            index_SEC, weight_SEC = (
                jax.lax.dynamic_slice_in_dim(x, experts.first, E, 1) for x in (index_SEC, weight_SEC)
            )
        row_S11 = jnp.arange(S)[:, None, None]
        # Empty places hold zeros: whatever lies in tokens that nobody chose must not reach a gradient.
        x_SECD = x_SND.at[row_S11, index_SEC].get(mode="fill", fill_value=0)
        y_ECD = experts.equal(jnp.reshape(jnp.swapaxes(x_SECD, 0, 1), (E, S * C, D)))
        y_SECD = jnp.swapaxes(jnp.reshape(y_ECD, (E, S, C, D)), 0, 1)
        weighted_SECD = weight_SEC[..., None] * y_SECD.astype(jnp.float32)
        y_SND = jnp.zeros((S, N, D), jnp.float32).at[row_S11, index_SEC].add(weighted_SECD, mode="drop")
        return y_SND, jnp.float32(0)

    return on_each_device(run, experts, x_SND, index_SEC, weight_SEC)[0]


def serve_tokens(experts: Experts, x_BTD: jax.Array, chosen_BTE: jax.Array, weight_BTE: jax.Array) -> jax.Array:
    """The same, told from the side of the tokens: float32 [B, T, D], the sum over the experts that have chosen a token.
    Any number of experts may choose a token, and an expert any number of tokens."""
    index_BTE = jnp.where(chosen_BTE, jnp.arange(experts.count, dtype=jnp.int32), experts.count)
    weight_BTE = jnp.where(chosen_BTE, weight_BTE, 0.0)

    def run(experts: LocalExperts, x_BTD, index_BTE, weight_BTE):
        B, T, E = index_BTE.shape
        return _by_expert(experts, x_BTD, index_BTE - experts.first, weight_BTE, B * T * min(E, experts.here))

    return on_each_device(run, experts, x_BTD, index_BTE, weight_BTE, exchange="gather")[0].astype(jnp.float32)


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
