"""safetensors in a directory: one file or numbered shards with an index. Nothing in them is executed."""

import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterable

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from maxlike.checkpoint_tree import Leaf
from maxlike.convert.config_json import read_json
from maxlike.errors import UserError

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorFiles:
    """The tensors of a directory by name; a tensor is read when it is asked for, and `release` lets go of the shards,
    whose pages count as this process's memory as long as they are mapped.

    Refuses a directory without safetensors, an index that leads out of it or names what its shard does not hold, and
    a damaged file.
    """

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self._files: dict[str, safetensors.safe_open] = {}
        self._shard: dict[str, str] = {}
        if (directory / INDEX).is_file():
            listed = read_json(directory / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
                raise UserError(f"{directory / INDEX} has no weight_map of names: bring back a good copy")
            for shard in sorted(set(listed.values())):
                if pathlib.PurePath(shard).name != shard:
                    raise UserError(f"{directory / INDEX} names the shard {shard!r}, which is no plain file name")
                for name in self._open(shard):
                    self._shard[name] = shard
            lost = [name for name, shard in listed.items() if self._shard.get(name) != shard]
            if lost:
                raise UserError(f"{directory / INDEX} says that {listed[lost[0]]} holds {lost[0]}, and it does not")
        elif (directory / ONE).is_file():
            self._shard = dict.fromkeys(self._open(ONE), ONE)
        else:
            other = sorted(path.name for path in directory.glob("*.bin"))
            hint = f"; {other[0]} is a pickle, which is never read: save it as safetensors" if other else ""
            raise UserError(f"{directory} holds neither {ONE} nor {INDEX}{hint or ': name a directory that does'}")
        self.leaves = {name: self._leaf(name) for name in self._shard}
        self.release()

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        shard = self._shard[name]
        if shard not in self._files:
            self._open(shard)
        return self._files[shard].get_tensor(name)

    def release(self) -> None:
        """Unmaps the shards."""
        self._files.clear()

    def _open(self, shard: str) -> list[str]:
        path = self.directory / shard
        try:
            self._files[shard] = safetensors.safe_open(path, "numpy")
            return list(self._files[shard].keys())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}): bring back a good copy") from error

    def _leaf(self, name: str) -> Leaf:
        header = self._files[self._shard[name]].get_slice(name)
        return Leaf(tuple(header.get_shape()), DTYPES.get(header.get_dtype(), header.get_dtype()))


def write(
    directory: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    *,
    dtype: str,
    shard_bytes: int,
    exact: Collection[str] = (),
) -> list[str]:
    """Writes the tensors `tensor(name)` of `shapes` in that dtype, those named in `exact` in float32, at most
    `shard_bytes` a file (a larger tensor has a file of its own); returns the names of the files. One shard is in memory
    at a time."""
    dtypes = {name: jnp.dtype("float32" if name in exact else dtype) for name in shapes}
    sizes = {name: int(np.prod(shape)) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _divide(sizes, shard_bytes)
    files = [ONE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in _from_1(shards)]
    for file, names in zip(files, shards, strict=True):
        content = {name: np.ascontiguousarray(tensor(name).astype(dtypes[name])) for name in names}
        safetensors.numpy.save_file(content, directory / file, metadata={"format": "pt"})
        del content  # before the next shard is made
        (directory / file).chmod(0o644)  # the library makes it private to its owner
    if len(shards) > 1:
        listed = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        body = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
        (directory / INDEX).write_text(json.dumps(body, indent=2) + "\n")
        files.append(INDEX)
    return files


def _from_1(shards: list) -> Iterable[int]:
    return range(1, len(shards) + 1)


def _divide(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def without(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """The names that no pattern matches."""
    return [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)]
