"""A trained model out of a run directory, for every job that does not train."""

import pathlib

from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.program import Program
from maxlike.run_dir import RunDirectory


def restore(
    experiment: Experiment, run_dir: str | pathlib.Path, checkpoint: int | None = None
) -> tuple[Program, dict, int]:
    """(program, state, step) of a run's checkpoint, by default its newest intact one, on the experiment's mesh.

    The state has what a model is used with: parameters (the averaged ones where there are any) and buffers. Moments,
    the larger part of a checkpoint, stay on disk, and may be those of another optimizer.

    Reads only: it may run beside a training that is under way. Raises UserError where there is nothing to restore, the
    tokenizer changed, or the checkpoint is of another model.
    """
    run = RunDirectory(run_dir, mode="read")
    experiment.check_vocabulary()
    program = Program.of(experiment, experiment.mesh.open())
    store = experiment.checkpoints.open(run.checkpoints, read_only=True, say=print)
    if store.latest() is None:
        raise UserError(f"{run.path} holds no checkpoint yet: train first, `--job train` with the same --run_dir")
    without = {"opt", "guard"} | ({"params"} if "ema" in program.state else set())
    state, metadata = store.restore(
        {name: tree for name, tree in program.state.items() if name not in without},
        {"tokenizer": experiment.data.tokenizer.fingerprint},
        step=checkpoint,
        without=without,
    )
    store.close()
    return program, state, metadata["next_step"]
