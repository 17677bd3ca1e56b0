"""Rows about the state of a run: where it lies, and whether it survives a checkpoint."""

import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from maxlike import checkpoint_tree
from maxlike.check.compare import METRICS, Comparison, Record, compare
from maxlike.check.subject import Subject
from maxlike.check.training import mesh_overlays, on_mesh
from maxlike.check.variant import LeftOut, Row
from maxlike.errors import UserError
from maxlike.program import Program
from maxlike.sharding import flat_axes
from maxlike.train import Training

SAVED, TRAINED = 2, 4  # updates before the checkpoint, and in all


def placed(subject: Subject) -> Iterator[Row]:
    """On each mesh, with the experiment's own optimizer: every moment and average of a parameter is cut as the rules
    say that the parameter is."""
    for mesh, overlays in mesh_overlays().items():
        name = f"placed/{mesh.removeprefix('mesh/')}"

        def judge(overlays: tuple[str, ...] = overlays) -> Comparison:
            variant, _, _ = on_mesh(subject, overlays)
            program = Program.of(subject.real(overlays=overlays), variant.layout)
            return _held(program, program.init())

        if subject.wants(name):
            yield subject.row(name, f"moments cut as their parameters on {mesh}", judge)


def _held(program: Program, state: dict) -> Comparison:
    """Compares what a device holds of every array of the state with what the rules give it."""
    shapes = {name: leaf.shape for name, leaf in checkpoint_tree.flatten(program.model.params).items()}
    axes = {"/".join(names): logical for names, logical in flat_axes(program.model.axes).items()}
    worst, first = 0.0, None
    for path, leaf in checkpoint_tree.flatten(state).items():
        names = path.split("/")
        owner = next((o for i in range(len(names)) if (o := "/".join(names[i:])) in shapes), None)
        if owner is None or leaf.shape != shapes[owner]:
            continue
        wanted = program.layout.sharding(axes[owner], leaf.shape, owner).shard_shape(leaf.shape)
        held = leaf.sharding.shard_shape(leaf.shape)
        excess = math.prod(held) / math.prod(wanted) - 1
        worst = max(worst, excess)
        if excess > 0 and first is None:
            first = f"{path}: a device holds {list(held)} of {list(leaf.shape)}, the rules give it {list(wanted)}"
    return Comparison(worst, 0.0, first)


class _Silent:
    """The log of a run that nobody watches."""

    def say(self, sentence: str) -> None:
        """Says nothing: what the store tells is in the comparison."""


def resume(subject: Subject) -> Iterator[Row]:
    """A run that is saved, forgotten and restored against one that goes on: every bit of batches, losses and state."""

    def judge() -> Comparison:
        with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
            return compare(*_straight_and_resumed(subject, pathlib.Path(folder)), 0.0)

    yield subject.row("resume", f"restored after step {SAVED} against straight on, to step {TRAINED}", judge)


def _straight_and_resumed(subject: Subject, folder: pathlib.Path) -> tuple[Record, Record]:
    """(the resumed run, the straight one) from the checkpoint on, on mesh/fsdp where that takes the twin."""
    experiment = subject.real(overlays=["mesh/single"])
    try:
        cut = subject.real(overlays=["mesh/fsdp"])
        program = Program.of(cut, cut.mesh.open())
        experiment = cut
    except UserError:  # the row `mesh/fsdp` says why
        program = Program.of(experiment, experiment.mesh.open())
    try:
        batches = subject.train_batches(experiment)
    except UserError as missing:
        raise LeftOut(f"its data are not there: {missing}") from missing
    step = program.lower_step(batches.batch(0)).compile()
    store = experiment.checkpoints.open(folder)
    training = Training(experiment, program, run=None, batches=batches, store=store, log=_Silent())
    state, _ = _train(training, step, program.init(), 0, SAVED)
    training.save(SAVED, state)
    store.wait()
    straight: Record = {"restored": {"next step": np.asarray(SAVED)} | _flat(state)}
    after, rest = _train(training, step, state, SAVED, TRAINED, began=0)
    next_step, restored = training.restore()
    store.close()
    resumed: Record = {"restored": {"next step": np.asarray(next_step)} | _flat(restored)}
    if compare(resumed, straight, 0.0).first is not None:  # another dtype would not even run
        return resumed, straight
    final, again = _train(training, step, restored, next_step, TRAINED)
    return resumed | again | {"state at the end": _flat(final)}, straight | rest | {"state at the end": _flat(after)}


def _train(
    training: Training, step: Any, state: dict, start: int, end: int, began: int | None = None
) -> tuple[dict, Record]:
    """Updates start..end on batches read from step `began` on, as a run that began there reads them."""
    record: Record = {}
    program = training.program
    began = start if began is None else began
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    with training.batches.iterate(began) as rows:
        for number, batch in zip(range(began, end), rows, strict=False):
            if number < start:
                continue
            record[f"batch of step {number + 1}"] = batch
            state, metrics = step(state, program.put(batch), allow)
            record[f"{METRICS} of step {number + 1}"] = {name: np.asarray(x) for name, x in metrics.items()}
    return state, record


def _flat(state: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in checkpoint_tree.flatten(state).items()}
