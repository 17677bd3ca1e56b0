"""The part of checkpointing that speaks to Orbax and to the file system."""

import dataclasses
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maxlike import checkpoint_tree
from maxlike.checkpoint_tree import Leaf
from maxlike.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """What is saved beside the arrays: the step, every leaf's shape and dtype, and the metadata of the run (JSON)."""

    step: int
    tree: dict[str, Leaf]
    metadata: dict


def saver() -> ocp.AsyncCheckpointer:
    # Directories made in the background cost five minutes of waiting for them where the copy to the host fails.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(_handler(), async_options=options)


def to_save(flat: dict[str, Any], record: Record) -> ocp.args.Composite:
    """Orbax's arguments for a state given as {path: leaf}."""
    stored = checkpoint_tree.nest({path: checkpoint_tree.to_stored(leaf) for path, leaf in flat.items()})
    tree = {path: [list(leaf.shape), leaf.dtype, leaf.key_impl] for path, leaf in record.tree.items()}
    body = {"format": FORMAT, "step": record.step, "tree": tree, "run": record.metadata}
    json.dumps(body, allow_nan=False)  # Orbax would find out in the background, where it looks like a full disk
    return ocp.args.Composite(state=ocp.args.PyTreeSave(stored), metadata=ocp.args.JsonSave(body))


def read_record(directory: pathlib.Path) -> Record:
    """The record of a checkpoint that is intact. Raises UserError where it is of a format this code does not know."""
    with ocp.Checkpointer(_handler()) as reader:
        body = reader.restore(directory, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())).metadata
    if body.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {directory} has format {body.get('format')} and this maxlike reads format {FORMAT}: "
            "restore it with the version that wrote it"
        )
    tree = {path: Leaf(tuple(shape), dtype, key_impl) for path, (shape, dtype, key_impl) in body["tree"].items()}
    return Record(body["step"], tree, body["run"])


def read_leaves(directory: pathlib.Path, wanted: dict[str, Any], saved: dict[str, Leaf]) -> dict[str, Any]:
    """{path: leaf} for the abstract leaves `wanted`, placed by their shardings. Shapes and dtypes must agree."""
    form = {path: _abstract_form(leaf) for path, leaf in wanted.items()}
    arguments = ocp.args.PyTreeRestore(
        item=checkpoint_tree.nest({path: item for path, (item, _) in form.items()}),
        restore_args=checkpoint_tree.nest({path: how for path, (_, how) in form.items()}),
        partial_restore=True,
    )
    with ocp.Checkpointer(_handler()) as reader:
        nested = reader.restore(directory, args=ocp.args.Composite(state=arguments)).state
    stored = checkpoint_tree.flatten(nested)
    return {path: checkpoint_tree.from_stored(stored[path], leaf, saved[path]) for path, leaf in wanted.items()}


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def remove(directory: pathlib.Path) -> None:
    """Removes a checkpoint so that a kill half-way does not leave part of it under its name."""
    doomed = directory.with_name(f"{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def is_storage_failure(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, came from the file system (tensorstore raises ValueError)."""
    if error is None:
        return False
    if isinstance(error, OSError) or "os_error_code" in str(error):
        return True
    return is_storage_failure(error.__cause__) or is_storage_failure(error.__context__)


def quieten_orbax() -> None:
    """Keeps Orbax's own log off the terminal: each failure reaches us as an exception and is told in a sentence."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/checkpoint/" not in record.pathname


def _handler() -> ocp.CompositeCheckpointHandler:
    # What is left out would cost the training loop processor time: weights hardly compress, and the files that repeat
    # shardings (restoring gives its own) and chunk shapes were a third of the time of a save.
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False, array_metadata_store=None)
    numbers = ocp.type_handlers.NumpyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (np.ndarray, numbers))
    state = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    return ocp.CompositeCheckpointHandler(state=state, metadata=ocp.JsonCheckpointHandler())


def _abstract_form(leaf: Any) -> tuple[Any, ocp.RestoreArgs]:
    """Orbax's item and arguments for one abstract leaf."""
    if not isinstance(leaf, jax.ShapeDtypeStruct | jax.Array):
        return np.asarray(leaf), ocp.RestoreArgs(restore_type=np.ndarray)
    words = jax.eval_shape(jax.random.key_data, leaf) if checkpoint_tree.is_key(leaf) else leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    item = jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)
    return item, ocp.ArrayRestoreArgs(sharding=sharding, global_shape=item.shape, dtype=item.dtype, strict=True)
