"""A mixture that begins where another run stopped, so that a second stage sees new data."""

import numpy as np

from maxlike.data import files
from maxlike.data.mixture import Interleave, Mixture
from maxlike.errors import UserError


class Continued(Mixture):
    """Constant weights, read from the batch that a run with the same weights, seed and batch size would read after
    `skip_steps` steps. Bound in `data.Data.mixture` of a stage that begins with another run's parameters: upcycling
    keeps the position of the data (MoMa, arXiv 2407.21770, section 2.6).

    weights: {source: weight}, as in Mixture.phases. skip_steps: steps of the runs before, >= 0.
    Refuses a negative skip_steps, and what Mixture refuses.
    """

    def __init__(self, *, weights: dict[str, float], skip_steps: int):
        super().__init__(phases=((0, weights),))
        if skip_steps < 0:
            raise UserError(f"Continued.skip_steps={skip_steps} must be the steps of the run before, 0 or more")
        self.skip_steps = skip_steps

    def interleave(self, sources: list[str], batch_size: int) -> Interleave:
        return _Later(super().interleave(sources, batch_size), self.skip_steps * batch_size)


class _Later(Interleave):
    """Example n is example n + skip of another interleave of one phase."""

    def __init__(self, of: Interleave, skip: int):
        super().__init__(of.names, of.starts, of.weights)
        self.skip = skip

    def counts(self, examples: int) -> np.ndarray:
        return super().counts(examples + self.skip) - super().counts(self.skip)

    def expected(self, examples: int) -> np.ndarray:
        return super().expected(examples + self.skip) - super().expected(self.skip)

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return super().locate(examples + self.skip)

    def history(self, examples: int) -> str:
        return files.digest("continued", self.skip, super().history(examples))
