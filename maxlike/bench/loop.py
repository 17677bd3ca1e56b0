"""What the training loop adds to the compiled step: Python, waiting for input, saving."""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from maxlike import train
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word, random_batch
from maxlike.checkpoint import Checkpoints
from maxlike.experiment import Experiment
from maxlike.hooks import Hook
from maxlike.program import Program

WARM_UP = 5  # first steps, which do not count
OVERLAP = 3  # steps that a save is counted to overlap


class _Watch(Hook):
    """Processor time of the loop's own thread at every step. Waiting for the device or the loader costs it none."""

    def __init__(self):
        self.at: dict[int, float] = {}

    def __call__(self, step: int, state: dict, metrics: dict[str, Any]) -> None:
        self.at[step] = time.thread_time()


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Trains the experiment for a while, `repeats` times, and reads its metrics.jsonl; saves fall on every `steps`."""
    bare = _dispatch_seconds(experiment)
    python, waits, saves = [], [], []
    for _ in range(repeats):
        watch = _Watch()
        total = WARM_UP + 4 * steps
        short = dataclasses.replace(
            experiment, steps=total, hooks=(watch,), checkpoints=Checkpoints(every=steps), warm_start=None
        )
        with tempfile.TemporaryDirectory() as folder:
            train.train(short, folder)
            rows = _train_rows(pathlib.Path(folder) / "metrics.jsonl")
        saved = {step + i for step in range(steps, total, steps) for i in range(OVERLAP)}
        plain = [step for step in range(WARM_UP, total) if step not in saved and step - 1 in watch.at]
        python.append(1000 * (statistics.median(watch.at[s] - watch.at[s - 1] for s in plain) - bare))
        tokens = experiment.clock.tokens_per_step
        seconds = {s: tokens / rows[s]["tokens_per_second"] for s in rows if s >= WARM_UP}
        waits.append(100 * statistics.median(rows[s]["input_wait"] for s in plain if s in rows))
        # Means on both sides: step times have a long upper tail, so a mean beside a median would see a cost in nothing.
        usual = statistics.mean(seconds[s] for s in plain if s in seconds)
        saves.append(100 * (statistics.mean(seconds[s] for s in saved if s in seconds) / usual - 1))
    quantities = [
        Quantity("Python outside the compiled call", "ms a step", python, "<= 3"),
        Quantity("waiting for input", "% of a step", waits, "< 1"),
        Quantity(f"an asynchronous save, on each of the {OVERLAP} steps it overlaps", "% of a step", saves, "< 5"),
    ]
    details = {"dispatch_ms": 1000 * bare, "steps": total, "save_every": steps}
    name = experiment.config.name.replace("/", "_") if experiment.config else "experiment"
    return Result(f"loop_{name}", device_word(), quantities, details)


def _train_rows(path: pathlib.Path) -> dict[int, dict]:
    """The lines of the train split that have a speed, by step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines if line["split"] == "train" and "tokens_per_second" in line}


def _dispatch_seconds(experiment: Experiment, steps: int = 20) -> float:
    """Processor time of this thread in the call of the compiled step alone."""
    program = Program.of(experiment, experiment.mesh.open())
    step = program.lower_step(random_batch(experiment, experiment.bare().vocab)).compile()
    state, batch = program.init(), program.put(random_batch(experiment, experiment.bare().vocab))
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    spent = []
    for _ in range(steps):
        began = time.thread_time()
        state, metrics = step(state, batch, allow)
        spent.append(time.thread_time() - began)
        jax.block_until_ready(metrics)
    return statistics.median(spent)
