"""Hooks: what happens beside training, after a step. Each is a small object bound in `Experiment.hooks`.

The loop calls `hook(step, state, metrics)` after it has dispatched update number `step` and before the next one may
donate `state`. `state` and `metrics` are arrays that may still be in the making: a hook that reads them waits for them,
so only a hook that is due should.
"""

from typing import TYPE_CHECKING, Any

import jax

from maxlike.decode.generate import Generator
from maxlike.decode.sampling import Sampling
from maxlike.errors import UserError

if TYPE_CHECKING:
    from maxlike.train import Training


class Hook:
    """Base of all hooks: override what is needed."""

    def open(self, training: "Training") -> None:
        """Before the first step: `training` gives the experiment, the program, the run directory and the log."""

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        """After update number `step` (from 1)."""

    def close(self) -> None:
        """After the last step, also when training fails."""


def _every(owner: str, every: int) -> int:
    if every < 1:
        raise UserError(f"{owner}.every={every}: give a number of steps of at least 1")
    return every


class Validate(Hook):
    """Loss and bits per byte on the validation split, every `every` steps and after the last one.

    Writes a line with split `validation` to metrics.jsonl, which `Checkpoints.keep_best` chooses by. Needs
    `Data.validation`.
    """

    def __init__(self, *, every: int = 200):
        self.every = _every("Validate", every)

    def open(self, training: "Training") -> None:
        self.training = training
        self.batches = training.experiment.open_validation()

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step % self.every == 0 or step == self.training.experiment.steps:
            self.training.log.flush()  # the step is over here; what follows is not its time
            self.training.record_validation(step, self.training.program.evaluate(state, self.batches))


class Sample(Hook):
    """Continues `prompts` every `every` steps and after the last one, and shows the text; the report keeps the last.

    max_new: tokens generated. temperature, top_p: see `maxlike.decode.sampling.Sampling`.
    """

    def __init__(
        self,
        *,
        prompts: tuple[str, ...],
        every: int = 500,
        max_new: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ):
        self.every = _every("Sample", every)
        if not prompts:
            raise UserError("Sample.prompts is empty: give at least one text to continue")
        self.prompts = tuple(prompts)
        self.max_new = max_new
        self.sampling = Sampling(temperature=temperature, top_p=top_p)

    def open(self, training: "Training") -> None:
        self.training = training
        experiment = training.experiment
        self.generator = Generator(
            training.program.model.graph, experiment.data.tokenizer, max_length=experiment.sequence_length
        )
        for prompt in self.prompts:
            self.generator.encode(prompt, self.max_new)  # refuses one that does not fit now rather than at step `every`

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step % self.every and step != self.training.experiment.steps:
            return
        self.training.log.flush()
        params = self.training.program.trained(state)
        texts = self.generator(
            params, self.prompts, buffers=state["buffers"], max_new=self.max_new, sampling=self.sampling
        )
        self.training.record_samples(step, list(zip(self.prompts, texts)))


class Profile(Hook):
    """Writes a trace of `steps` steps from step `start` on under the run's `profile/`, for TensorBoard or Perfetto."""

    def __init__(self, *, start: int = 20, steps: int = 3):
        if start < 1 or steps < 1:
            raise UserError(f"Profile.start={start}, Profile.steps={steps}: both must be at least 1")
        self.start = start
        self.steps = steps
        self.running = False

    def open(self, training: "Training") -> None:
        self.folder = training.run.path / "profile"

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        if step == self.start:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self.folder)
            self.running = True
        elif self.running and step == self.start + self.steps:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
