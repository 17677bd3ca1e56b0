"""Measure: what tools find in a network when it is trained."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from maxlike.activations.statistic import Statistic, together
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.hooks import Hook
from maxlike.program import Program

if TYPE_CHECKING:
    from maxlike.train import Training

Values = dict[str, float | list[float]]


class Measure(Hook):
    """Runs `tools` after the last step; what they find becomes one line with split `measured` in metrics.jsonl.

    tools: objects called as `tool(experiment, program, state) -> {name: number}`, or a list of numbers, one a layer.
        Statistics of activations (`maxlike.activations`) share one pass over the same rows. Refuses no tools, and two
        that give one name.
    """

    def __init__(self, *, tools: tuple[Callable, ...]):
        if not tools:
            raise UserError("Measure.tools is empty: bind at least one tool, such as @kurtosis.Kurtosis()")
        self.tools = tuple(tools)

    def open(self, training: "Training") -> None:
        self.training = training
        for tool in self.tools:
            if isinstance(tool, Statistic):
                tool.check(training.experiment)  # refuses now rather than when the training is over

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        experiment = self.training.experiment
        if step == experiment.steps:
            self.training.log.flush()
            self.training.log.measured(step, measured(self.tools, experiment, self.training.program, state))


def measured(tools: tuple[Callable, ...], experiment: Experiment, program: Program, state: dict) -> Values:
    """What all tools find, in one dict."""
    statistics = tuple(tool for tool in tools if isinstance(tool, Statistic))
    values = together(statistics, experiment, program, state)
    for tool in tools:
        if not isinstance(tool, Statistic):
            found = tool(experiment, program, state)
            twice = sorted(found.keys() & values.keys())
            if twice:
                raise UserError(f"Measure.tools has two tools that give {twice[0]!r}: keep one of them")
            values |= found
    return values
