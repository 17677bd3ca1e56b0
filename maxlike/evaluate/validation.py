"""`--job evaluate`: the metrics of a checkpoint on the validation split."""

import json
import pathlib

from maxlike.experiment import Experiment
from maxlike.restore import restore


def evaluate(experiment: Experiment, run_dir: pathlib.Path, *, checkpoint: int | None = None) -> dict[str, float]:
    """Loss (nats a token) and bits per byte of a run's checkpoint on the whole validation split, printed as JSON.

    checkpoint: the step to evaluate; by default the newest.
    """
    batches = experiment.open_validation()
    program, state, step = restore(experiment, run_dir, checkpoint)
    metrics = program.evaluate(state, batches)
    print(json.dumps({"step": step, "split": "validation"} | metrics))
    return metrics
