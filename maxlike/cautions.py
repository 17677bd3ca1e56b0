"""What a run does otherwise than its experiment's file may be read, told at its start."""

from layers.mixture_of_depths import MixtureOfDepths
from layers.modality_moe import ModalityMoE
from layers.parts import every_part
from maxlike.experiment import Experiment
from maxlike.pipelines import schedule
from maxlike.sharding import Layout


def cautions(experiment: Experiment, layout: Layout) -> list[str]:
    """One sentence each. Today: routers that choose in "batch" choose in a micro-batch where the batch is cut (MoMa,
    arXiv 2407.21770, chooses in the batch of a device)."""
    cuts = _cuts(experiment, layout)
    if not cuts:
        return []
    routing = every_part(experiment.bare(), (ModalityMoE, MixtureOfDepths))
    rows = experiment.batch_size
    for parts in cuts.values():
        rows //= parts
    names = " and ".join(f"{knob}={parts}" for knob, parts in cuts.items())
    return [
        f"{knob}='batch' compares the tokens of {rows} rows, not of all {experiment.batch_size} of the batch, which is "
        f"cut by {names}: each part is routed by itself"
        for knob in sorted(set(map(_batch_routed, routing)) - {""})
    ]


def _cuts(experiment: Experiment, layout: Layout) -> dict[str, int]:
    """{knob: parts} of what cuts the rows of a batch into parts that pass the network one after another."""
    cuts = {"Step.micro_batches": experiment.step.micro_batches}
    passed = schedule(experiment) if layout.mesh_axes("layers") else None
    if passed is not None:
        cuts[f"{type(passed).__name__}.micro_batches"] = passed.micro_batches
    return {knob: parts for knob, parts in cuts.items() if parts > 1}


def _batch_routed(part: ModalityMoE | MixtureOfDepths) -> str:
    """The knob that says so, "" where it says otherwise."""
    if isinstance(part, ModalityMoE):
        return "ModalityMoE.routing_scope" if part.routing_scope == "batch" else ""
    return "MixtureOfDepths.scope" if part.scope == "batch" else ""
