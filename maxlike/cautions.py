"""What a run does otherwise than its experiment's file may be read, told at its start."""

from typing import Any

import jax

from layers.language_model import LanguageModel
from layers.mixture_of_depths import MixtureOfDepths
from layers.modality_moe import ModalityMoE
from maxlike.experiment import Experiment
from maxlike.one_f_one_b import OneFOneB
from maxlike.sharding import Layout


def cautions(experiment: Experiment, layout: Layout) -> list[str]:
    """One sentence each. Today: routers that choose in "batch" choose in a micro-batch where the batch is cut (MoMa,
    arXiv 2407.21770, chooses in the batch of a device)."""
    network, cuts = experiment.bare(), _cuts(experiment, layout)
    if not cuts:
        return []
    rows = experiment.batch_size
    for parts in cuts.values():
        rows //= parts
    names = " and ".join(f"{knob}={parts}" for knob, parts in cuts.items())
    return [
        f"{knob}='batch' compares the tokens of {rows} rows, not of all {experiment.batch_size} of the batch, which is "
        f"cut by {names}: each part is routed by itself"
        for knob in sorted(set(map(_batch_routed, _parts(network))) - {""})
    ]


def _cuts(experiment: Experiment, layout: Layout) -> dict[str, int]:
    """{knob: parts} of what cuts the rows of a batch into parts that pass the network one after another."""
    step, network = experiment.step, experiment.bare()
    cuts = {"Step.micro_batches": step.micro_batches}
    if layout.mesh_axes("layers"):
        if isinstance(step.gradients, OneFOneB):
            cuts["OneFOneB.micro_batches"] = step.gradients.micro_batches
        elif isinstance(network, LanguageModel) and network.stack.pipeline is not None:
            cuts["Circular.micro_batches"] = network.stack.pipeline.micro_batches
    return {knob: parts for knob, parts in cuts.items() if parts > 1}


def _parts(network: Any) -> list[Any]:
    """The modules that route, those inside a MixtureOfDepths too."""
    found = [part for part in jax.tree.leaves(network, is_leaf=_routes) if _routes(part)]
    inner = [one for part in found if isinstance(part, MixtureOfDepths) for one in _parts(part.block)]
    return found + inner


def _routes(part: Any) -> bool:
    return isinstance(part, ModalityMoE | MixtureOfDepths)


def _batch_routed(part: ModalityMoE | MixtureOfDepths) -> str:
    """The knob that says so, "" where it says otherwise."""
    if isinstance(part, ModalityMoE):
        return "ModalityMoE.routing_scope" if part.routing_scope == "batch" else ""
    return "MixtureOfDepths.scope" if part.scope == "batch" else ""
