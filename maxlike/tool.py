"""Tool: what `maxlike.measure.Measure` runs on a trained network."""

from maxlike.experiment import Experiment
from maxlike.program import Program


class Tool:
    """Base of the tools that can tell before a training whether they will work after it."""

    def check(self, experiment: Experiment) -> None:
        """Raises UserError for an experiment whose network or data this tool cannot measure."""

    def __call__(self, experiment: Experiment, program: Program, state: dict) -> dict[str, float | list[float]]:
        """{name: number}, or a list of numbers, one a layer."""
        raise TypeError(f"{type(self).__name__} is a tool that measures nothing: override __call__")
