"""An experiment with one thing changed, as plans and searches ask about it."""

import copy
from collections.abc import Callable
from typing import Any

from layers.parts import parts
from layers.pipeline import Circular
from layers.stack import Stack
from maxlike.experiment import Experiment
from maxlike.optimizers.moments import Moments


def with_mesh(experiment: Experiment, shape: dict[str, int]) -> Experiment:
    """The experiment with another `Mesh.shape`."""
    mesh = copy.copy(experiment.mesh)
    mesh.shape = dict(shape)
    return experiment.changed(mesh=mesh)


def with_micro_batches(experiment: Experiment, micro_batches: int) -> Experiment:
    """The experiment with another `Step.micro_batches`."""
    step = copy.copy(experiment.step)
    step.micro_batches = micro_batches
    return experiment.changed(step=step)


def with_moments(experiment: Experiment, moments: Moments) -> Experiment:
    """The experiment with another `Step.moments`."""
    step = copy.copy(experiment.step)
    step.moments = moments
    return experiment.changed(step=step)


def on_device(experiment: Experiment) -> Experiment:
    """The experiment with its optimizer's state on the device: a mesh without devices cannot say what other memories
    they have."""
    moments = experiment.step.moments
    if moments.memory == "device":
        return experiment
    return with_moments(experiment, Moments(dtype=moments.dtype, rounding=moments.rounding))


def with_remat(experiment: Experiment, remat: str) -> Experiment:
    """The experiment with another `Stack.remat`."""

    def change(stack: Stack) -> None:
        stack.remat = remat

    return _with_stacks(experiment, change)


def with_pipeline(experiment: Experiment, micro_batches: int) -> Experiment:
    """The experiment with the `Stack.pipeline` of the overlay mesh/pipeline, of so many micro-batches."""

    def change(stack: Stack) -> None:
        stack.pipeline = Circular(micro_batches=micro_batches)

    return _with_stacks(experiment, change)


def _with_stacks(experiment: Experiment, change: Callable[[Stack], None]) -> Experiment:
    def model(rngs: Any) -> Any:
        network = experiment.model(rngs=rngs)
        for stack in parts(network, Stack):
            change(stack)
        return network

    return experiment.changed(model=model)
