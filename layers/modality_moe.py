"""Modality-aware mixture of experts: one group of experts a modality, experts that choose their tokens."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, selection
from layers.auxiliary_router import agreement, router_product
from layers.context import Context, ReadsFuture
from layers.dispatch import serve, serve_tokens
from layers.expert_parallel import spread, whole_on_devices
from layers.experts import Experts


@dataclasses.dataclass
class Routed:
    """What a group did to the tokens [S, N] of S routing scopes.

    y_SND: float32, 0 for tokens that no expert took. times_SN: how many experts took each. load_E: tokens an expert
    took. wanted: choices that the router made, buffers left aside. entropy: of its scores as shares of their sum, in
    nats, summed over its tokens. agreement: of the auxiliary router with the router.
    """

    y_SND: jax.Array
    times_SN: jax.Array
    load_E: jax.Array
    wanted: jax.Array
    entropy: jax.Array
    agreement: dict[str, jax.Array]


class ExpertGroup(nnx.Module):
    """The experts of one modality and their router; part of ModalityMoE. A group of one expert has no router: its
    expert takes every token with weight 1."""

    def __init__(
        self,
        dim: int,
        *,
        count: int,
        width: int,
        capacity_factor: float,
        capacity_bound: float,
        auxiliary: Callable | None,
        rngs: nnx.Rngs,
    ):
        self.count, self.share, self.bound = count, capacity_factor / count, capacity_bound
        self.experts = Experts(dim, count=count, width=width, rngs=rngs)
        router = ((dim, count), ("embed", "routed"), axes.normal(0.02))
        self.router = axes.param(rngs, *router, exact=True) if count > 1 else None
        self.auxiliary = auxiliary(dim, outputs=count, rngs=rngs) if auxiliary is not None and count > 1 else None

    def _logits(self, x_SND: jax.Array) -> jax.Array:
        if self.router is None:
            return jnp.zeros((*x_SND.shape[:2], 1), jnp.float32)
        return router_product(x_SND, self.router[...])

    def _gate(self, logits: jax.Array) -> jax.Array:
        return jnp.ones_like(logits) if self.router is None else jax.nn.sigmoid(logits)

    def _entropy(self, gate_SNE: jax.Array, member_SN: jax.Array) -> jax.Array:
        share_SNE = gate_SNE / (jnp.sum(gate_SNE, -1, keepdims=True) + 1e-20)
        entropy_SN = -jnp.sum(jax.scipy.special.xlogy(share_SNE, share_SNE), -1)
        return jnp.sum(jnp.where(member_SN, entropy_SN, 0.0))

    def by_choice(self, x_SND: jax.Array, member_SN: jax.Array, noise: jax.Array | None, rows: int) -> Routed:
        """Each expert takes the best share of its modality's tokens in each scope; `noise` is a key or None, `rows` how
        many rows the scopes have come from."""
        S, N, _ = x_SND.shape
        scopes_are_whole = whole_on_devices(S) and whole_on_devices(rows)
        logits_SNE = self._logits(x_SND)
        if noise is not None and self.router is not None:  # the difference of two Gumbel draws is one logistic draw
            logits_SNE = logits_SNE + jax.random.logistic(noise, logits_SNE.shape)
        scores_SEN = jnp.where(member_SN[:, None], jnp.swapaxes(logits_SNE, 1, 2), -jnp.inf)
        # A scope that lies on several devices is chosen in on each of them, by scores alone.
        scores_SEN = axes.constrain(scores_SEN, "batch" if scopes_are_whole else None, None, None)
        wanted_S = selection.share(jnp.sum(member_SN, 1), self.share)
        slots = min(N, math.ceil(self.bound * self.share * N))
        index_SEC, taken_SEC = selection.best(scores_SEN, jnp.broadcast_to(wanted_S[:, None], (S, self.count)), slots)
        chosen_SEN = selection.marked(index_SEC, taken_SEC, N)
        gate_SNE = self._gate(logits_SNE)
        if scopes_are_whole:
            gate_SEC = jnp.take_along_axis(jnp.swapaxes(gate_SNE, 1, 2), index_SEC, axis=2)
            y_SND = serve(self.experts, x_SND, jnp.where(taken_SEC, index_SEC, N), gate_SEC)
        else:
            y_SND = self._by_token(x_SND, jnp.swapaxes(chosen_SEN, 1, 2), gate_SNE, rows)
        told = {}
        if self.auxiliary is not None and noise is None:  # noise is no part of what an auxiliary router shall learn
            foretold_SEN = jnp.swapaxes(self.auxiliary(x_SND), 1, 2)
            told = agreement(foretold_SEN, chosen_SEN, jnp.broadcast_to(member_SN[:, None], chosen_SEN.shape))
        load_E = jnp.sum(taken_SEC, (0, 2))
        entropy, wanted = self._entropy(gate_SNE, member_SN), self.count * jnp.sum(wanted_S)
        return Routed(y_SND, jnp.sum(chosen_SEN, 1), load_E, wanted, entropy, told)

    def _by_token(self, x_SND, chosen_SNE, weight_SNE, rows: int) -> jax.Array:
        of_rows = (jnp.reshape(z, (rows, -1, z.shape[2])) for z in (x_SND, chosen_SNE, weight_SNE))
        return jnp.reshape(serve_tokens(self.experts, *of_rows), x_SND.shape)

    def by_auxiliary(self, x_SND: jax.Array, member_SN: jax.Array, sparse: bool) -> Routed:
        """Each token goes to the experts whose auxiliary router fires, which may be none or all of them. The weight is
        the main router's.

        sparse: compute the pairs of token and expert that occur, so that of few tokens only the experts that they chose
        are read. Else, and for whole rows on one device faster, every expert runs on every token: nothing bounds how
        many it gets."""
        S, N, D = x_SND.shape
        fires_SNE = member_SN[..., None]
        if self.auxiliary is not None:
            fires_SNE = fires_SNE & (self.auxiliary(x_SND) > 0)
        gate_SNE = self._gate(self._logits(x_SND))
        weight_SNE = jnp.where(fires_SNE, gate_SNE, 0.0)
        if sparse or spread():
            y_SND = serve_tokens(self.experts, x_SND, fires_SNE, weight_SNE)
        else:
            y_ECD = self.experts(jnp.broadcast_to(jnp.reshape(x_SND, (1, S * N, D)), (self.count, S * N, D)))
            y_ESND = jnp.reshape(y_ECD, (self.count, S, N, D)).astype(jnp.float32)
            y_SND = jnp.einsum("esnd,sne->snd", y_ESND, weight_SNE)
        load_E = jnp.sum(fires_SNE, (0, 1))
        entropy = self._entropy(gate_SNE, member_SN)
        return Routed(y_SND, jnp.sum(fires_SNE, 2), load_E, jnp.sum(load_E), entropy, {})


class ModalityMoE(nnx.Module, ReadsFuture):
    """Expert choice inside groups of experts, one group a modality (MoMa: Lin et al. 2024, arXiv 2407.21770, sections
    2.2 and 2.3; expert choice: Zhou et al. 2022, arXiv 2202.09368).

        y = sum over the experts j of the token's modality that chose it of sigmoid(x . w_j) SwiGLU_j(x)

    Of the b tokens of a modality in a routing scope, each of its E experts takes the floor(b capacity_factor / E) with
    the highest score (equal ones: the earlier). Scores are not renormalised, and a token that nobody chose gets y = 0.
    Padding is never routed. x and y: [B, T, D]. ctx.modality_BT comes from LanguageModel.modality_starts.

    Knobs:
        groups: experts of each modality, in the order of the modality ids: (4, 4). A group of one expert has no router
            and no gate. One group serves all modalities alike: (8,) is plain expert choice.
        width F >= 1 of every expert.
        capacity_factor in (0, E]: how many experts a token gets on average.
        capacity_bound: for each group the largest share of a scope's tokens that its modality is given room for, in
            (0, 1]; choices beyond it are dropped, lowest scores first, and counted in the metric "dropped". All room is
            computed, so None, room for every token in every group, drops nothing and costs as many feed-forwards as
            there are groups (measured on CPU with 4 + 4 experts: 1.8 of the dense one, and 1.06 with (0.65, 0.4) for
            a mix of 5 to 3).
        routing_scope: among which tokens experts choose: "sequence", each row by itself; n >= 1, n neighbouring rows;
            "batch", all rows (of a micro-batch, where Step.micro_batches cuts the batch).
        router_noise: "gumbel_sigmoid" adds the difference of two Gumbel draws to the logits in training, in ranking and
            in the gate; a training call without a key has none.
        auxiliary: factory of the auxiliary routers, such as AuxiliaryRouter, or None.
        evaluation: how an evaluation routes: "top_k" as training does, which sees tokens to come, so its loss is too
            good for a decoder; "auxiliary" as decoding does.
    Decoding has no tokens to compare with: a token goes to the experts whose auxiliary router fires, with the main
    router's weight. aux: unselected (share of tokens that no expert took), dropped (share of choices lost to
    capacity_bound), max_load (most tokens of an expert over its group's mean), entropy (of a token's scores as shares
    of their sum, nats), ffn_experts (experts that a token visits on average), flops_per_token (forward matrix products
    as routed, of routers and experts), and where auxiliary routers are compared with the choice, without noise,
    auxiliary_bce, auxiliary_accuracy, auxiliary_recall.
    Refuses an empty group, capacities outside their ranges, several groups without modality ids, another number of
    modalities than groups, and decoding without auxiliary routers.
    """

    def __init__(
        self,
        dim: int,
        *,
        groups: tuple[int, ...],
        width: int,
        capacity_factor: float = 1.0,
        capacity_bound: tuple[float, ...] | None = None,
        routing_scope: Literal["sequence", "batch"] | int = "sequence",
        router_noise: Literal["none", "gumbel_sigmoid"] = "none",
        auxiliary: Callable | None = None,
        evaluation: Literal["top_k", "auxiliary"] = "top_k",
        rngs: nnx.Rngs,
    ):
        bounds = (1.0,) * len(groups) if capacity_bound is None else tuple(capacity_bound)
        routed = [count for count in groups if count > 1]
        _check(groups, capacity_factor, bounds, routing_scope, router_noise)
        if evaluation not in ("top_k", "auxiliary"):
            raise ValueError(f"ModalityMoE.evaluation={evaluation!r} must be 'top_k' or 'auxiliary'")
        if evaluation == "auxiliary" and auxiliary is None and routed:
            raise ValueError(
                "ModalityMoE.evaluation='auxiliary' needs ModalityMoE.auxiliary, a factory such as AuxiliaryRouter"
            )
        self.routing_scope, self.router_noise, self.evaluation = routing_scope, router_noise, evaluation
        self.causal = auxiliary is not None or not routed
        # In groups of one every token has its expert: there is nothing to choose, so no factor either.
        factors = [capacity_factor if count > 1 else 1.0 for count in groups]
        self.factor, self.router_flops = sum(factors) / len(groups), 2.0 * dim * sum(routed)
        self.groups = nnx.List(
            [
                ExpertGroup(
                    dim,
                    count=count,
                    width=width,
                    capacity_factor=factor,
                    capacity_bound=bound,
                    auxiliary=auxiliary,
                    rngs=rngs,
                )
                for count, factor, bound in zip(groups, factors, bounds)
            ]
        )

    def _members(self, ctx: Context) -> list[jax.Array]:
        """For each group bool [B, T]: the tokens that are its own."""
        real_BT = selection.real_tokens(ctx)
        if len(self.groups) == 1:
            return [real_BT]
        if ctx.modality_BT is None:
            raise ValueError(
                f"ModalityMoE.groups names {len(self.groups)} modalities and tokens have no modality ids: set "
                "LanguageModel.modality_starts"
            )
        if ctx.modalities not in (None, len(self.groups)):
            raise ValueError(
                f"ModalityMoE.groups={tuple(group.count for group in self.groups)} must name as many groups as "
                f"LanguageModel.modality_starts makes modalities, {ctx.modalities}, or one for all"
            )
        return [real_BT & (ctx.modality_BT == modality) for modality in range(len(self.groups))]

    def _scopes(self, rows: int) -> int:
        """Into how many routing scopes a batch of `rows` rows falls."""
        size = {"sequence": 1, "batch": rows}.get(self.routing_scope, self.routing_scope)
        if rows % size:
            raise ValueError(f"ModalityMoE.routing_scope={size} does not divide a batch of {rows} rows")
        return rows // size

    def check_decoding(self) -> None:
        if not self.causal:
            raise ValueError(
                "ModalityMoE.auxiliary is None: expert choice compares a token with later ones, which decoding does "
                "not have; train auxiliary routers (objective AuxiliaryRouters) and decode with them"
            )

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        if ctx.decoding:
            self.check_decoding()
        B, T, D = x_BTD.shape
        by_auxiliary = ctx.decoding or (self.evaluation == "auxiliary" and not ctx.train)
        S = B if by_auxiliary else self._scopes(B)
        noisy = self.router_noise == "gumbel_sigmoid" and ctx.train and ctx.key is not None
        x_SND = jnp.reshape(x_BTD, (S, -1, D))
        results, members = [], [jnp.reshape(member_BT, (S, -1)) for member_BT in self._members(ctx)]
        for index, (group, member_SN) in enumerate(zip(self.groups, members)):
            if by_auxiliary:
                results.append(group.by_auxiliary(x_SND, member_SN, sparse=ctx.decoding))
            else:
                noise = jax.random.fold_in(ctx.key, index) if noisy else None
                results.append(group.by_choice(x_SND, member_SN, noise, B))
        y_BTD = jnp.reshape(sum(result.y_SND for result in results), (B, T, D)).astype(x_BTD.dtype)
        metrics = _metrics(results, members)
        metrics["flops_per_token"] = self.router_flops + metrics["ffn_experts"] * self.groups[0].experts.flops_per_row
        return axes.constrain(y_BTD, "batch", "residual_length", "act_embed"), metrics

    def flops_per_token(self, length: int) -> float:
        """The experts that tokens get on average (modalities counted alike, should their capacities differ), and every
        router; not the room that capacity_bound leaves empty."""
        return self.factor * self.groups[0].experts.flops_per_row + self.router_flops

    def idle_parameters(self) -> float:
        """Those of the experts that a token does not get, on average and modalities counted alike."""
        return sum(g.experts.idle_parameters(g.share * g.count / len(self.groups)) for g in self.groups)


def _check(groups, capacity_factor, bounds, routing_scope, router_noise) -> None:
    if not groups or min(groups) < 1:
        raise ValueError(
            f"ModalityMoE.groups={groups} needs at least 1 expert in every group: the tokens of a modality without one "
            "would pass unchanged"
        )
    most = min([count for count in groups if count > 1], default=1)
    if not 0 < capacity_factor <= most or (max(groups) == 1 and capacity_factor != 1):
        raise ValueError(
            f"ModalityMoE.capacity_factor={capacity_factor} must be above 0 and at most {most}, the experts of the "
            "smallest group that chooses (1.0 where every group has one expert)"
        )
    if len(bounds) != len(groups) or not all(0 < bound <= 1 for bound in bounds):
        raise ValueError(
            f"ModalityMoE.capacity_bound={bounds} needs a share in (0, 1] for each of the {len(groups)} groups, or None"
        )
    if routing_scope not in ("sequence", "batch") and (isinstance(routing_scope, str) or routing_scope < 1):
        raise ValueError(f"ModalityMoE.routing_scope={routing_scope!r} must be 'sequence', 'batch' or rows >= 1")
    if router_noise not in ("none", "gumbel_sigmoid"):
        raise ValueError(f"ModalityMoE.router_noise={router_noise!r} must be 'none' or 'gumbel_sigmoid'")


def _metrics(results: list[Routed], members: list[jax.Array]) -> dict[str, jax.Array]:
    real_SN = sum(members) > 0
    times_SN = sum(result.times_SN for result in results)
    wanted = sum(result.wanted for result in results)
    taken = sum(jnp.sum(result.load_E) for result in results)
    loads = [jnp.max(r.load_E) / jnp.maximum(jnp.mean(r.load_E.astype(jnp.float32)), 1e-9) for r in results]
    metrics = {
        "unselected": jnp.sum(real_SN & (times_SN == 0)) / jnp.maximum(jnp.sum(real_SN), 1),
        "dropped": (wanted - taken) / jnp.maximum(wanted, 1),
        "max_load": jnp.max(jnp.stack(loads)),
        "entropy": jax.lax.stop_gradient(sum(result.entropy for result in results)) / jnp.maximum(jnp.sum(real_SN), 1),
        "ffn_experts": taken / jnp.maximum(jnp.sum(real_SN), 1),
    }
    # Groups count alike, but for those whose modality does not occur.
    told = [(result.agreement, jnp.any(member_SN)) for result, member_SN in zip(results, members) if result.agreement]
    if told:
        groups = jnp.maximum(sum(occurs.astype(jnp.float32) for _, occurs in told), 1.0)
        metrics |= {name: sum(one[name] for one, _ in told) / groups for name in told[0][0]}
    return metrics
