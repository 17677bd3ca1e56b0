"""Training: one loop for every experiment. Objective, optimizer, data, mesh and hooks are the experiment's."""

import dataclasses
import importlib.metadata
import pathlib
import time
from typing import Any

import jax
import numpy as np

from layers import kernels
from maxlike import interrupt
from maxlike.checkpoint import Store
from maxlike.data.data import Batches
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.log import Log
from maxlike.program import Program
from maxlike.run_dir import RunDirectory


@dataclasses.dataclass
class Training:
    """What is in use while an experiment trains; hooks get it at `open`."""

    experiment: Experiment
    program: Program
    run: RunDirectory
    batches: Batches
    store: Store
    log: Log
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    dropped: set[int] = dataclasses.field(default_factory=set)  # steps whose update a rewind gave up

    def record_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps and logs the metrics of the validation split after `step` updates."""
        self.validation = metrics
        self.log.validation(step, metrics)

    def record_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Keeps and shows generated text: (prompt, continuation) pairs."""
        self.log.samples(step, samples)

    def save(self, step: int, state: dict) -> None:
        """A checkpoint of the state after `step` updates, with what resuming needs."""
        metadata = {
            "next_step": step,
            "fingerprints": self.batches.identity(step),
            "config": self.experiment.config.operative if self.experiment.config else "",
            "code": importlib.metadata.version("maxlike"),
            "dropped": sorted(self.dropped),
        }
        self.store.save(step, state, metadata, self.validation)

    def restore(self) -> tuple[int, dict]:
        """(next step, state) of the newest intact checkpoint."""
        state, metadata = self.store.restore(self.program.state, self.batches.identity)
        self.dropped |= set(metadata["dropped"])
        return metadata["next_step"], state

    def begin(self) -> tuple[int, dict]:
        """(next step, state): from the newest checkpoint where there is one, else freshly initialised."""
        if self.store.latest() is not None:
            step, state = self.restore()
            self.log.say(f"resuming {self.run.path} after step {step}")
            return step, state
        state = self.program.init()
        if self.experiment.warm_start is not None:
            state = self.experiment.warm_start(state, self.program.state, self.log.say)
        return 0, state


def train(experiment: Experiment, run_dir: str | pathlib.Path) -> dict[str, float]:
    """Trains to `Experiment.steps`, resuming whatever the run directory holds; returns the last validation metrics.

    A request to stop (SIGTERM, Ctrl-C) saves a checkpoint after the current step and returns early; the same call then
    continues, and every later loss equals an uninterrupted run's bit for bit.
    """
    layout = experiment.mesh.open()
    mode = "own" if jax.process_index() == 0 else "join"
    with RunDirectory(run_dir, mode=mode) as run, Log(run, experiment) as log:
        if experiment.config is not None:
            log.config(experiment.config)
        program = Program.of(experiment, layout)
        batches = experiment.data.train(
            sequence_length=experiment.sequence_length,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            steps=experiment.steps,
        )
        kernels.forget()
        began = time.monotonic()
        step_function = program.lower_step().compile()
        log.start(program, batches, step_function, time.monotonic() - began)
        store = experiment.checkpoints.open(run.checkpoints, say=log.say)
        training = Training(experiment, program, run, batches, store, log)
        try:
            _loop(training, step_function)
        finally:
            for hook in experiment.hooks:
                hook.close()
            store.close()
        return training.validation


def _loop(training: Training, step_function: jax.stages.Compiled) -> None:
    experiment, log, program = training.experiment, training.log, training.program
    step, state = training.begin()
    log.resume(step)
    if step >= experiment.steps:
        log.say(f"{training.run.path} is already trained to step {step}: raise Experiment.steps to go on")
        return
    for hook in experiment.hooks:
        hook.open(training)
    allowed = {allow: jax.device_put(np.bool_(allow), program.layout.replicated) for allow in (True, False)}
    rewinds = 0
    while step < experiment.steps:
        try:
            with training.batches.iterate(step, host=jax.process_index(), hosts=jax.process_count()) as rows:
                while step < experiment.steps:
                    waited = time.monotonic()
                    batch = next(rows)
                    waited = time.monotonic() - waited
                    state, metrics = step_function(state, program.put(batch), allowed[step not in training.dropped])
                    step += 1
                    log.step(step, metrics, waited)
                    _judge(training, log.last)
                    for hook in experiment.hooks:
                        hook(step, state, metrics)
                    stop = interrupt.requested()
                    if stop or experiment.checkpoints.due(step) or step == experiment.steps:
                        training.save(step, state)
                    if stop:
                        break
            log.flush()
            _judge(training, log.last)
        except Rewind as bad:
            rewinds += 1
            if rewinds > experiment.step.guard.patience:
                raise UserError(f"{bad}; rewinding {rewinds - 1} times did not help: lower the learning rate") from None
            training.store.wait()
            step, state = training.begin()
            # The same steps again would lead to the same place: their data are given up, as PaLM did at a spike.
            training.dropped |= set(range(step, bad.step))
            log.say(f"{bad}: going back to step {step}; the updates of steps {step + 1} to {bad.step} will be dropped")
            log.resume(step)
            continue
        if interrupt.requested():
            break
    training.store.wait()
    if step < experiment.steps:
        log.say(f"stopped as asked after step {step}, checkpoint saved; the same command continues")
    else:
        log.finish()


class Rewind(Exception):
    """A bad step under the policy `rewind`."""

    def __init__(self, step: int, sentence: str):
        super().__init__(sentence)
        self.step = step


def _judge(training: Training, row: dict[str, Any] | None) -> None:
    """Applies the guard's policy to the metrics of the step before the one just dispatched."""
    if row is None or not row["bad"] or row["step"] - 1 in training.dropped:
        return
    guard = training.experiment.step.guard
    documents = training.batches.documents(row["step"] - 1)
    names = ", ".join(dict.fromkeys(f"{source}: {document}" for row in documents for source, document, _, _ in row))
    sentence = (
        f"step {row['step']} is bad: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}, "
        f"documents {names[:400]}"
    )
    if guard.on_bad == "rewind":
        raise Rewind(row["step"], sentence)
    if guard.on_bad == "stop":
        raise UserError(f"{sentence}; look at it with `--job data --step {row['step'] - 1}`, or set Guard.on_bad")
    training.log.say(f"{sentence}; its update was dropped")
    if row["bad_in_a_row"] >= guard.patience:
        raise UserError(
            f"{sentence}; {row['bad_in_a_row']} bad steps in a row: lower the learning rate, or raise Guard.patience"
        )
