"""The schedule by which an experiment's micro-batches pass the stages of a mesh."""

from layers.parts import parts
from layers.pipeline import Circular
from layers.stack import Stack
from maxlike.experiment import Experiment
from maxlike.one_f_one_b import OneFOneB


def schedule(experiment: Experiment) -> Circular | OneFOneB | None:
    """`Step.gradients` where it is one, else `Stack.pipeline`; None without either. On a mesh without stages nothing is
    passed on, whatever this says."""
    if isinstance(experiment.step.gradients, OneFOneB):
        return experiment.step.gradients
    circular = [stack.pipeline for stack in parts(experiment.bare(), Stack) if stack.pipeline is not None]
    return circular[0] if circular else None
