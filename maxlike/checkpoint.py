"""Checkpoints: Orbax behind five verbs, strict about what it restores and unable to stop a training run.

On disk `checkpoints/STEP/` is an Orbax composite (`state`, `metadata`) plus `manifest.json`; a directory with a plain
number for a name is whole. A save goes to `STEP.unfinished-ATTEMPT` and gets its name after the manifest is written.
`STEP.damaged` is a checkpoint that failed its manifest when a run resumed and was passed over.
"""

import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from maxlike import checkpoint_files as files
from maxlike import checkpoint_tree, manifest
from maxlike.errors import UserError

PyTree = Any
Say = Callable[[str], None]
Expected = dict[str, Any] | Callable[[int], dict[str, Any]]
LEFTOVER = re.compile(r"\d+\.(unfinished.*|removed)")


class Checkpoints:
    """When to save a run and which saves to keep. `open` gives the store that does it.

    every: steps between saves, >= 1.
    keep: how many of the latest are kept, >= 1; 2 leave one to fall back on should the newest be damaged.
    keep_every: keep for good each checkpoint whose step it divides; a multiple of `every`, or None.
    keep_best: keep also the checkpoint where this validation metric ('loss', 'bits_per_byte') was lowest, or None.
    asynchronous: write behind the training loop, which then waits for the copy from the device alone.
    allow_changed: names of fingerprints that may differ from those in the checkpoint: 'tokenizer', 'mixture',
        'transforms', 'source NAME', 'order (seed, batch_size, sequence_length)'.
    """

    def __init__(
        self,
        *,
        every: int = 500,
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: str | None = None,
        asynchronous: bool = True,
        allow_changed: tuple[str, ...] = (),
    ):
        if every < 1:
            raise UserError(f"Checkpoints.every = {every} is not a number of steps: use 1 or more")
        if keep < 1:
            raise UserError(f"Checkpoints.keep = {keep} would keep nothing to resume from: use 1 or more")
        if keep_every is not None and (keep_every < every or keep_every % every):
            raise UserError(f"Checkpoints.keep_every = {keep_every} must be a multiple of Checkpoints.every = {every}")
        self.every, self.keep, self.keep_every, self.keep_best = every, keep, keep_every, keep_best
        self.asynchronous = asynchronous
        self.allow_changed = tuple(allow_changed)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` updates."""
        return step > 0 and step % self.every == 0

    def open(self, directory: pathlib.Path, *, read_only: bool = False, say: Say = logging.warning) -> "Store":
        """The store of one run. read_only: never touch the directory (evaluation, generation beside a live run)."""
        return Store(self, directory, read_only, say)


class Store:
    """The checkpoints in one directory. `say` is told, in a sentence, of every failure and every fallback; it may be
    called from another thread. `failures` counts the saves that did not reach the disk."""

    def __init__(self, policy: Checkpoints, directory: pathlib.Path, read_only: bool, say: Say):
        self.directory = pathlib.Path(directory).resolve()
        self.failures = 0
        self._policy, self._read_only, self._say = policy, read_only, say
        self._current: int | None = None  # step of the newest checkpoint known to hold this process's own past
        self._pending: Future | None = None
        self._attempts = 0
        files.quieten_orbax()
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._saver = files.saver()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. Their files are checked when they are restored, not here."""
        return files.steps(self.directory)

    def latest(self) -> int | None:
        """The newest finished checkpoint, or None: as process 0 sees it, which gives checkpoints their names. Every
        process must ask."""
        return _agreed(max(self.steps(), default=None))

    def save(self, step: int, state: PyTree, metadata: dict, metrics: dict[str, float] | None = None) -> None:
        """Saves `state` after `step` updates; returns once the state is on the host, so it may then be donated.

        metadata: JSON; 'fingerprints' in it, {name: JSON}, is what `restore` compares. metrics: the latest validation
        metrics, for keep_best. A disk that is full or fails is counted and told, and the next save tries again;
        anything else is raised. Steps above `step` belong to a future that was given up: once this save is whole they
        are removed.
        """
        self._wait_for_the_last_save(step)
        self._current = _agreed(self._current)  # process 0 may have failed to name what the others have written
        if step == self._current:
            return
        flat = checkpoint_tree.flatten(state)
        tree = {path: checkpoint_tree.describe(path, leaf) for path, leaf in flat.items()}
        self._attempts += 1  # threads of a save that failed may still write under the name they were given
        target = self.directory / f"{step}.unfinished-{self._attempts}"
        arguments = files.to_save(flat, files.Record(step, tree, metadata))
        try:
            self._saver.save(target, args=arguments, force=True)
        except Exception as error:  # tensorstore has no exception of its own: a full disk is a ValueError
            if not files.is_storage_failure(error):
                raise
            self._failed(step, error)
            return
        self._pending = self._worker.submit(self._finish, step, target, metrics or {})
        if not self._policy.asynchronous:
            self.wait()

    def restore(
        self,
        abstract_state: PyTree,
        expected: Expected,
        step: int | None = None,
        allow: Collection[str] = (),
        without: Collection[str] = (),
    ) -> tuple[PyTree, dict]:
        """(state, metadata) of `step`, by default of the newest intact checkpoint, telling which were passed over.

        abstract_state: jax.ShapeDtypeStructs with shardings (any mesh; without one, the default device), NumPy arrays
            and Python numbers. expected: fingerprints that must be as saved, unless their names are in `allow` or in
            Checkpoints.allow_changed; a function where they depend on the step. without: trees of the saved state, such
            as 'opt', that are not in `abstract_state` and stay on disk.
        Raises UserError where no checkpoint is intact, a fingerprint changed, or a path, shape or dtype differs.
        """
        self.wait()
        step, damaged = self._choose(step)
        record = files.read_record(self.directory / str(step))
        prints = expected(step) if callable(expected) else expected
        checkpoint_tree.check_fingerprints(
            step, record.metadata.get("fingerprints", {}), prints, {*allow, *self._policy.allow_changed}
        )
        flat = checkpoint_tree.flatten(abstract_state)
        wanted = {path: checkpoint_tree.describe(path, leaf) for path, leaf in flat.items()}
        saved = {path: leaf for path, leaf in record.tree.items() if path.partition("/")[0] not in without}
        table = checkpoint_tree.difference(saved, wanted)
        if table:
            raise UserError(
                f"checkpoint {step} in {self.directory} is of another model or optimizer: use the experiment that "
                f"wrote it, or another --run_dir\n{table}"
            )
        leaves = files.read_leaves(self.directory / str(step), flat, record.tree)
        if not self._read_only:
            self._current = step
            self._set_aside(damaged)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), list(leaves.values())), record.metadata

    def metadata(self, step: int | None = None) -> dict:
        """The metadata of `step`, by default of the newest intact checkpoint, without its state."""
        self.wait()
        return files.read_record(self.directory / str(self._choose(step)[0])).metadata

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits for the save under way and lets go of the threads."""
        self.wait()
        if not self._read_only:
            self._worker.shutdown()
            self._saver.close()

    def _wait_for_the_last_save(self, step: int) -> None:
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > 1.0:
            self._say(f"step {step} waited {waited:.1f} s for the checkpoint before it: raise Checkpoints.every")

    def _finish(self, step: int, target: pathlib.Path, metrics: dict[str, float]) -> None:
        """In the background: waits for Orbax, writes the manifest, names the directory, drops what is not kept."""
        try:
            self._saver.wait_until_finished()
        except Exception as error:  # the state was already copied: whatever fails here is the way to the disk
            self._failed(step, error)
            return
        if jax.process_index() != 0:
            self._current = step
            return
        try:
            finite = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
            manifest.write(target, {"step": step, "metrics": finite})
            final = self.directory / str(step)
            if final.exists():
                files.remove(final)
            target.rename(final)
            self._current = step
        except OSError as error:
            self._failed(step, error)
            return
        self._sweep()  # threads of Orbax may have written on after the failure of an earlier save
        try:
            for old in set(self.steps()) - self._kept(step):
                files.remove(self.directory / str(old))
        except OSError as error:
            self._say(f"an old checkpoint could not be removed ({error}): the disk may fill up")

    def _failed(self, step: int, error: Exception) -> None:
        self.failures += 1
        reason = re.sub(r"\s*\[tensorstore_spec=.*", "", str(error), flags=re.DOTALL)
        last = max(self.steps(), default=None)
        self._say(
            f"the checkpoint of step {step} could not be saved ({type(error).__name__}: {reason}); training goes on, "
            f"{'there is no checkpoint yet' if last is None else f'the last good one is step {last}'}; free some space"
        )
        self._sweep()

    def _kept(self, newest: int) -> set[int]:
        policy = self._policy
        steps = [step for step in self.steps() if step <= newest]
        kept = set(steps[-policy.keep :])
        if policy.keep_every is not None:
            kept |= {step for step in steps if step % policy.keep_every == 0}
        if policy.keep_best is not None:
            values = {step: self._metrics(step).get(policy.keep_best) for step in steps}
            known = {step: value for step, value in values.items() if value is not None}
            kept |= {min(known, key=known.__getitem__)} if known else set()
        return kept

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            return manifest.facts(self.directory / str(step))["metrics"]
        except ValueError:  # a damaged manifest: restoring will tell; here it only cannot be the best
            return {}

    def _choose(self, step: int | None) -> tuple[int, list[int]]:
        """The step to restore and the newer ones that are damaged. Process 0 decides, so that all restore the same."""
        chosen, damaged, reasons = None, [], []
        if step is not None and not _agreed(int(step in self.steps())):
            raise UserError(
                f"there is no checkpoint of step {step} in {self.directory}: it has the steps {self.steps()}"
            )
        if jax.process_index() == 0:
            for candidate in reversed(self.steps()) if step is None else [step]:
                reason = manifest.damage(self.directory / str(candidate))
                if reason is None:
                    chosen = candidate
                    break
                damaged.append(candidate)
                reasons.append(f"checkpoint {candidate} is damaged: {reason}")
        chosen = _agreed(chosen)
        if chosen is None:
            found = "; ".join(reasons) or "there is none"
            raise UserError(
                f"no checkpoint to restore in {self.directory} ({found}): bring back a good copy of one, or "
                "start over in another --run_dir"
            )
        for reason in reasons:
            self._say(f"{reason}; falling back to step {chosen}")
        return chosen, damaged

    def _set_aside(self, damaged: list[int]) -> None:
        for step in damaged:
            aside = self.directory / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / str(step)).rename(aside)

    def _sweep(self) -> None:
        """Removes what a killed or failed save left. Only the process that owns the directory may call it."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for path in self.directory.iterdir():
                if LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


def _agreed(step: int | None) -> int | None:
    """What process 0 says, on all processes: each sees the directory at a time of its own."""
    if jax.process_count() == 1:
        return step
    said = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if said < 0 else said
