"""Training: one loop for every experiment. Objective, optimizer, data, mesh and hooks are the experiment's."""

import concurrent.futures
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from maxlike import interrupt, passport
from maxlike.cautions import cautions
from maxlike.checkpoint import Store
from maxlike.config import bindings_of
from maxlike.console import Console, Screen
from maxlike.data.data import Batches
from maxlike.errors import Diverged
from maxlike.experiment import Experiment
from maxlike.log import Log
from maxlike.passport import Stamp
from maxlike.program import Program
from maxlike.revision import revision
from maxlike.run_dir import RunDirectory
from maxlike.sharding import Layout
from maxlike.watchdog import Watch

AGREE_STEPS = 10  # at most so many steps between the agreements of several processes on whether to stop,
AGREE_SECONDS = 5.0  # and about so many seconds: a machine that is taken back leaves 30


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
    passport: list[Stamp] = dataclasses.field(default_factory=list)  # where the parameters came from

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
            "code": revision(),
            "dropped": sorted(self.dropped),
            "passport": self.passport,
        }
        self.store.save(step, state, metadata, self.validation)

    def restore(self) -> tuple[int, dict]:
        """(next step, state) of the newest intact checkpoint."""
        state, metadata = self.store.restore(self.program.state, self.batches.identity)
        self.dropped |= set(metadata["dropped"])
        self.passport = metadata.get("passport", [])
        self._tell_what_changed(metadata)
        return metadata["next_step"], state

    def _tell_what_changed(self, metadata: dict) -> None:
        """Code and settings may differ from those a checkpoint was trained with, but not without a word."""
        step, code = metadata["next_step"], metadata["code"]
        if code != revision():
            self.log.say(f"changed since the checkpoint of step {step}: the code was {code}, now {revision()}")
        if self.experiment.config is None or not metadata["config"]:
            return
        then, now = (set(bindings_of(text)) for text in (metadata["config"], self.experiment.config.operative))
        for sign, lines in (("was", then - now), ("now", now - then)):
            for line in sorted(lines):
                self.log.say(f"changed since the checkpoint of step {step}, {sign}: {line}")

    def initial(self) -> dict:
        """The state of step 0, with another run's parameters where the experiment asks for them."""
        state = self.program.init()
        warm_start = self.experiment.warm_start
        if warm_start is not None:
            state, self.passport = warm_start(state, self.program.state, self.log.say)
        return state

    def begin(self) -> tuple[int, dict]:
        """(next step, state): the newest checkpoint's, or step 0's where there is none."""
        return (0, self.initial()) if self.store.latest() is None else self.restore()


def train(experiment: Experiment, run_dir: str | pathlib.Path) -> dict[str, float]:
    """Trains to `Experiment.steps`, resuming whatever the run directory holds; returns the last validation metrics.

    A request to stop (SIGTERM, Ctrl-C) saves a checkpoint after the current step and returns early; the same call then
    continues, and every later loss equals an uninterrupted run's bit for bit.
    """
    return fit(experiment, run_dir, Console(steps=experiment.steps))


def fit(
    experiment: Experiment,
    run_dir: str | pathlib.Path,
    screen: Screen,
    program_of: Callable[[Experiment, Layout], Program] = Program.of,
) -> dict[str, float]:
    """`train` with another screen than the terminal of one run, and with a program from elsewhere: of many runs, the
    next may have the compiled functions of the last."""
    layout = experiment.mesh.open()
    mode = "own" if jax.process_index() == 0 else "join"
    with RunDirectory(run_dir, mode=mode) as run, Log(run, experiment, screen) as log:
        experiment.check_vocabulary()
        program = program_of(experiment, layout)
        for sentence in cautions(experiment, layout):
            log.say(sentence)
        batches = experiment.data.train(
            sequence_length=experiment.sequence_length,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            steps=experiment.steps,
        )
        store = experiment.checkpoints.open(run.checkpoints, say=log.say)
        training = Training(experiment, program, run, batches, store, log)
        try:
            _train(training)
        finally:
            for hook in experiment.hooks:
                hook.close()
            store.close()
        return training.validation


def _train(training: Training) -> None:
    experiment, log, program = training.experiment, training.log, training.program
    # A checkpoint that does not fit is refused before anything is compiled.
    restored = None if training.store.latest() is None else training.restore()
    step = 0 if restored is None else restored[0]
    if step >= experiment.steps:
        log.say(f"{training.run.path} is already trained to step {step}: raise Experiment.steps to go on")
        if not training.run.report.is_file():  # a kill came between the last checkpoint and the report
            log.finish()
        return
    if experiment.config is not None:
        log.config(experiment.config)
    began = time.monotonic()
    compile_step = program.compiler(training.batches.batch(step))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # XLA compiles the step while the state is made
        compiling = thread.submit(compile_step)
        state = training.initial() if restored is None else restored[1]
        step_function = compiling.result()
    log.start(program, training.batches, step_function, time.monotonic() - began)
    if training.passport:
        log.say(passport.line(training.passport))
    if restored is not None:
        log.say(f"resuming {training.run.path} after step {step}")
    for hook in experiment.hooks:
        hook.open(training)
    watchdog = experiment.watchdog.over(training.run.path / "traces", step_function, program.layout.mesh, log.alarm)
    with interrupt.listening(), watchdog as watch:
        _loop(training, step_function, step, state, watch)


def _loop(training: Training, step_function: jax.stages.Compiled, step: int, state: dict, watch: Watch) -> None:
    """Steps until the last one or a request to stop, going back where the guard asks for it."""
    experiment, log = training.experiment, training.log
    log.resume(step)
    rewinds, stopped, rewound_to = 0, False, -1
    while step < experiment.steps and not stopped:
        try:
            step, state, stopped = _steps(training, step_function, step, state, watch)
        except Rewind as bad:
            with watch("checkpoint", bad.step):
                training.store.wait()
                step, state = training.begin()
            rewinds, rewound_to = (rewinds + 1 if step == rewound_to else 1), step
            if rewinds > experiment.step.guard.patience:
                raise Diverged(f"{bad}; rewinding {rewinds - 1} times did not help: lower the learning rate") from None
            # The same steps again would lead to the same place: their data are given up, as PaLM did at a spike.
            training.dropped |= set(range(step, bad.step))
            log.say(f"{bad}: going back to step {step}; the updates of steps {step + 1} to {bad.step} will be dropped")
            log.resume(step)
    training.store.wait()
    saved = training.store.latest()
    kept = (
        "checkpoint saved" if saved == step else f"but the checkpoint could not be saved, the last good one is {saved}"
    )
    if step < experiment.steps:
        log.say(f"stopped as asked after step {step}, {kept}; the same command continues")
        return
    if saved != step:
        log.say(f"trained to step {step}, {kept}: free some space and run the same command again")
    log.finish()


def _steps(
    training: Training, step_function: jax.stages.Compiled, step: int, state: dict, watch: Watch
) -> tuple[int, dict, bool]:
    """The inner loop: (step, state, whether a request to stop ended it). Step k + 1 is dispatched before the metrics of
    step k are read."""
    experiment, log, program = training.experiment, training.log, training.program
    allowed = {allow: jax.device_put(np.bool_(allow), program.layout.replicated) for allow in (True, False)}
    part, parts = program.feed
    with training.batches.iterate(step, host=part, hosts=parts) as rows:
        stop, requests = False, Requests()
        while step < experiment.steps and not stop:
            step += 1
            waited = time.monotonic()
            with watch("data", step):
                batch = next(rows)
            waited = time.monotonic() - waited
            with watch("step", step):
                allow = allowed[step - 1 not in training.dropped]
                state, metrics = step_function(state, program.put(batch), allow)
                log.step(step, metrics, waited)
            _judge(training)
            with watch("hooks", step):
                for hook in experiment.hooks:
                    hook(step, state, metrics)
            with watch("sync", step):
                stop = requests.heard()  # asked once a step, so that stopping and saving go together
            if stop or experiment.checkpoints.due(step) or step == experiment.steps:
                with watch("sync", step):
                    log.flush()
                _judge(training)  # a state that a rewind would leave is not worth keeping
                with watch("checkpoint", step):
                    training.save(step, state)
    log.flush()
    _judge(training)
    return step, state, stop


class Requests:
    """Whether any process was asked to stop. A save is everybody's, so several processes agree on the step, not after
    each one: agreeing waits for the steps under way."""

    def __init__(self):
        self._left = 1  # steps to the next agreement, the same on all processes
        self._agreed = time.monotonic()
        self._steps = 1  # since the last one

    def heard(self) -> bool:
        """Called by every process after every step."""
        if jax.process_count() == 1:
            return interrupt.requested()
        self._left -= 1
        if self._left:
            return False
        mine = np.float32([interrupt.requested(), time.monotonic() - self._agreed])
        asked, seconds = np.max(multihost_utils.process_allgather(mine), axis=0)
        self._left = self._steps = agree_after(float(seconds) / self._steps)
        self._agreed = time.monotonic()
        return bool(asked)


def agree_after(seconds: float) -> int:
    """Steps to the next agreement where a step takes so many seconds."""
    return max(1, min(AGREE_STEPS, int(AGREE_SECONDS / max(seconds, 1e-3))))


class Rewind(Exception):
    """A bad step under the policy `rewind`."""

    def __init__(self, step: int, sentence: str):
        super().__init__(sentence)
        self.step = step


def _judge(training: Training) -> None:
    """Applies the guard's policy to the metrics that were read since it was last asked."""
    row = training.log.take()
    if row is None or not row["bad"] or row["step"] - 1 in training.dropped:
        return
    guard = training.experiment.step.guard
    pieces = training.batches.documents(row["step"] - 1)
    names = ", ".join(dict.fromkeys(f"{piece.source}: {piece.document}" for piece in pieces))
    sentence = (
        f"step {row['step']} is bad: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}, "
        f"documents {names[:400]}"
    )
    if guard.on_bad == "rewind":
        raise Rewind(row["step"], sentence)
    if guard.on_bad == "stop":
        raise Diverged(f"{sentence}; look at it with `--job data --step {row['step'] - 1}`, or set Guard.on_bad")
    training.log.say(f"{sentence}; its update was dropped")
    if row["bad_in_a_row"] >= guard.patience:
        raise Diverged(
            f"{sentence}; {row['bad_in_a_row']} bad steps in a row: lower the learning rate, or raise Guard.patience"
        )
