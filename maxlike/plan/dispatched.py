"""Experts spread over devices, in a plan: what dispatch sends and holds, by the rules of `layers.dispatch`."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from layers.dispatch import Capacity, Dropless
from layers.moe import MoE
from maxlike.experiment import Experiment
from maxlike.plan.layouts import Shares, Weight
from maxlike.plan.trace import Trace


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of experts of which P devices hold a part each, on one device and for one micro-batch of R tokens.

    weight: its last weight [layers, experts, mlp, embed]. kind: how tokens come to experts: "all_to_all", "gather", or
    "none" where the devices of all experts have the same tokens. places: rows of the dispatch's arrays, filled or not.
    choices: rows that the dispatch of these tokens has where all experts are on one device. gathered: tokens that
    "gather" brings together, 0 for others.
    """

    weight: Weight
    kind: Literal["all_to_all", "gather", "none"]
    places: float
    choices: float
    gathered: float

    def kept(self, remat: str, shares: Shares) -> float:
        """Elements that one row keeps for the backward pass: the input of its expert, gate, up, their product and the
        result; of these what `layers.remat` names."""
        width, dim = self.weight.shape[-2:]
        width /= shares.parts(axis for axis in shares.layout.mesh_axes("mlp"))
        return {"none": 2 * dim + 3 * width, "matmul_half": 2 * width}.get(remat, 0.0)

    @property
    def exchanged(self) -> float:
        """Rows of the two arrays, sent and received, or gathered and not yet summed, of one exchange."""
        return {"all_to_all": self.places, "gather": self.gathered, "none": 0.0}[self.kind]


def mixtures(experiment: Experiment, shares: Shares, trace: Trace, rows: float) -> Iterator[Mixture]:
    """Every mixture of experts whose experts are spread, for micro-batches of so many rows on a device."""
    P = shares.parts(shares.expert_axes)
    if P == 1:
        return
    tokens = rows * experiment.sequence_length / shares.context
    swaps = set(shares.expert_axes) <= {*shares.batch_axes, *shares.length_axes}
    for weight, visited in experts(shares, trace):
        owner = next((moe for name, moe in shares.mixtures if weight.name.startswith(f"{name}/")), None)
        here = weight.shape[weight.axes.index("experts")] // P
        if owner is None:  # experts choose tokens
            kind = "none" if not swaps else "all_to_all" if shares.context == 1 else "gather"
            places = choices = tokens * visited
            if kind == "gather":
                places = P * tokens * here
        else:
            kind, places, choices = _chosen(owner, experiment.sequence_length, rows, shares, P if swaps else 1)
        yield Mixture(weight, kind, places, choices, P * tokens if kind == "gather" else 0.0)


def _chosen(moe: MoE, length: int, rows: float, shares: Shares, P: int):
    """(kind, places, choices) where tokens choose experts. P: devices that exchange tokens, 1 where none do."""
    N, tokens, dispatch = moe.experts.count, rows * length / shares.context, moe.dispatch
    here = N // shares.parts(shares.expert_axes)
    worst = tokens * min(moe.router.top_k, here)
    kind: Literal["all_to_all", "gather", "none"] = "all_to_all" if P > 1 else "none"
    if isinstance(dispatch, Capacity):
        taken = rows * N * dispatch.capacity(length, moe.router.expected / N, dispatch.factor)
        return kind, taken if shares.context == 1 else P * worst, taken
    if not isinstance(dispatch, Dropless):
        raise TypeError(f"plan does not know the dispatch {type(dispatch).__name__}: say what it sends in {__name__}")
    if kind == "all_to_all" and dispatch.exchange == "gather":
        kind = "gather"
    room = dispatch.places(tokens, moe.router.top_k, moe.router.expected / N, here, bounded=kind == "all_to_all")
    return kind, P * room, tokens * min(moe.router.top_k, N)


def experts(shares: Shares, trace: Trace) -> Iterator[tuple[Weight, float]]:
    """(the last weight of each mixture of experts, experts that a token visits in it on average)."""
    of_experts = [w for w in shares.weights if "experts" in w.axes and "mlp" in w.axes]
    total = sum(w.size for w in of_experts)
    idle = sum(w.size for w in shares.weights) - trace.active
    for weight in of_experts:
        if weight.axes[-1] == "embed":
            yield weight, (1 - idle / total) * weight.shape[weight.axes.index("experts")]
