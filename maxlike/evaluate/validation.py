"""`--job evaluate`: the metrics of a checkpoint on the validation split."""

import json
import pathlib

from maxlike import passport
from maxlike.experiment import Experiment
from maxlike.restore import restore


def evaluate(experiment: Experiment, run_dir: pathlib.Path, *, checkpoint: int | None = None) -> dict[str, float]:
    """Loss (nats a token) and bits per byte of a run's checkpoint on the whole validation split, printed as JSON, after
    one line on where its parameters came from if they began in another run.

    checkpoint: the step to evaluate; by default the newest.
    """
    batches = experiment.open_validation()
    program, state, step = restore(experiment, run_dir, checkpoint)
    origin = passport.read(pathlib.Path(run_dir) / "checkpoints" / str(step))
    if origin:
        print(passport.line(origin))
    metrics = program.evaluate(state, batches)
    print(json.dumps({"step": step, "split": "validation"} | metrics))
    return metrics
