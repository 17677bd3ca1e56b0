"""Measure: what tools find in a network when it is trained."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from maxlike.activations.statistic import Passes, Statistic
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.hooks import Hook
from maxlike.program import Program
from maxlike.tool import Tool

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
        self._others = tuple(tool for tool in self.tools if not isinstance(tool, Statistic))
        self._statistics = Passes(tuple(tool for tool in self.tools if isinstance(tool, Statistic)))

    def open(self, training: "Training") -> None:
        self.training = training
        self.check(training.experiment)  # refuses now rather than when the training is over

    def check(self, experiment: Experiment) -> None:
        """Raises UserError where a tool cannot measure the experiment's network."""
        for tool in self.tools:
            if isinstance(tool, Tool):
                tool.check(experiment)

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        experiment = self.training.experiment
        if step == experiment.steps:
            self.training.log.flush()
            self.training.log.measured(step, self.measured(self.training.program, state))

    def measured(self, program: Program, state: dict) -> Values:
        """What all tools find in a state of a program."""
        values = self._statistics(program.experiment, program, state)
        for tool in self._others:
            found = tool(program.experiment, program, state)
            twice = sorted(found.keys() & values.keys())
            if twice:
                raise UserError(f"Measure.tools has two tools that give {twice[0]!r}: keep one of them")
            values |= found
        return values
