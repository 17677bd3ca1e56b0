"""Parameters of one checkpoint in a model of another form: renamed, cut, picked by layer, repeated.

A path is a parameter or a whole subtree, '' the root. A map {path here: path there} uses, for each parameter, the
longest path that fits it: {'': ''} takes all by their own names, {'stack': 'decoder/stack', ...} renames. Behind a path
there may stand a cut of its leading dimensions, in Python's notation: 'embed/table[:2048]' is its first 2,048 rows,
'stack/periods[2:6]' the layers 2 to 5 of everything under it.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from maxlike import checkpoint_files as files
from maxlike import checkpoint_tree, manifest, passport
from maxlike.checkpoint_files import Record
from maxlike.checkpoint_tree import Leaf
from maxlike.errors import UserError

CUT = re.compile(r"(?P<path>[^\[\]]*)(\[(?P<cut>[0-9:,\s]+)\])?")
PART = re.compile(r"\s*(?P<start>\d*)\s*:\s*(?P<stop>\d*)\s*")


class Change(Protocol):
    """What happens to an array between the checkpoint and the model."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that an array of this shape gets."""

    def __call__(self, x: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Cut:
    """`bounds` (start, stop) of each leading dimension; None is an end of the array."""

    bounds: tuple[tuple[int | None, int | None], ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(self.bounds) > len(shape):
            raise UserError(
                f"[{self}] cuts {len(self.bounds)} dimensions of an array with shape {shape}: leave some out"
            )
        ends = [(start or 0, size if stop is None else stop) for (start, stop), size in zip(self.bounds, shape)]
        if any(not start < stop <= size for (start, stop), size in zip(ends, shape)):
            raise UserError(f"[{self}] leads out of an array with shape {shape}, or cuts nothing from it: correct it")
        return (*(stop - start for start, stop in ends), *shape[len(ends) :])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x[tuple(slice(start, stop) for start, stop in self.bounds)]

    def __str__(self) -> str:
        return ", ".join(":".join("" if end is None else str(end) for end in ends) for ends in self.bounds)


@dataclasses.dataclass(frozen=True)
class Pick:
    """Entries of the leading dimension, in this order; one may be taken several times."""

    indices: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(self.indices), *shape[1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x[jnp.asarray(self.indices)]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An array with dimensions of size 1, repeated there to the shape `to`."""

    to: tuple[int, ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.to

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, self.to)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: its path there, and what changes on the way."""

    path: str
    change: Change | None = None


@dataclasses.dataclass(frozen=True)
class Weights:
    """One tree of parameters ("params", or "ema" for averaged weights) in an intact checkpoint, not yet read."""

    directory: pathlib.Path
    record: Record
    tree: str

    @classmethod
    def open(cls, source: pathlib.Path, tree: str, say: Callable[[str], None]) -> "Weights":
        """source: a run directory, its `checkpoints`, or one checkpoint in it; the newest intact one is taken."""
        directory = checkpoint_in(source.resolve(), say)
        return cls(directory, files.read_record(directory), tree)

    @property
    def leaves(self) -> dict[str, Leaf]:
        """{path: shape and dtype}."""
        prefix = f"{self.tree}/"
        return {path.removeprefix(prefix): x for path, x in self.record.tree.items() if path.startswith(prefix)}

    def difference(
        self, origins: dict[str, Origin | None], here: dict[str, Any], ignore: Collection[str] = ()
    ) -> str | None:
        """The table of parameters that are not named, not there, of another shape or dtype once changed, or left behind
        without being in `ignore`; None where `origins` {path here: origin} gives every array that `here` describes."""
        there = self.leaves
        named = {path: origin for path, origin in origins.items() if origin is not None}
        saved = {path: _changed(origin, there[origin.path]) for path, origin in named.items() if origin.path in there}
        used = {origin.path for origin in named.values()}
        left = [path for path in there if path not in used and not any(within(path, root) for root in ignore)]
        described = {path: checkpoint_tree.describe(path, leaf) for path, leaf in here.items()}
        return checkpoint_tree.difference(saved | {f"{path} (unused)": there[path] for path in left}, described)

    def read(self, origins: dict[str, Origin], here: dict[str, Any]) -> dict[str, jax.Array]:
        """{path here: array}, placed as the abstract leaves `here` are. Raises UserError where a parameter is taken
        twice as it is; parts of it may be."""
        whole = [origin.path for origin in origins.values() if origin.change is None]
        if len(set(whole)) != len(whole):
            raise UserError(
                f"the mapping uses a parameter of {self.directory} twice: give each parameter a source of its own"
            )
        wanted: dict[str, Any] = {}
        for path, origin in sorted(origins.items(), key=lambda item: item[1].change is not None):
            name = f"{self.tree}/{origin.path}"
            wanted.setdefault(name, _as_saved(here[path], self.record.tree[name].shape))
        arrays = files.read_leaves(self.directory, wanted, self.record.tree)
        read = {path: arrays[f"{self.tree}/{origin.path}"] for path, origin in origins.items()}
        changing = {path: x for path, x in read.items() if origins[path].change is not None}
        if changing:
            placed = {path: here[path].sharding for path in changing}
            read |= jax.jit(
                lambda arrays: {path: origins[path].change(x) for path, x in arrays.items()}, out_shardings=placed
            )(changing)
        return read

    def buffers(self, origins: dict[str, Origin | None], here: dict[str, Any]) -> dict[str, jax.Array]:
        """{path here: array} of those buffers (routers' biases, running statistics) of the checkpoint that `origins`
        finds, in the form in which `here` describes them; the others are left out."""
        there = dataclasses.replace(self, tree="buffers")
        leaves = there.leaves
        named = {path: origin for path, origin in origins.items() if origin is not None and origin.path in leaves}
        fitting = {
            path: origin
            for path, origin in named.items()
            if _changed(origin, leaves[origin.path]) == checkpoint_tree.describe(path, here[path])
        }
        return there.read(fitting, here) if fitting else {}

    def passport(self, tool: str, done: dict) -> list[passport.Stamp]:
        """The passport of parameters that `tool` takes from here."""
        return passport.stamped(tool, self.directory, self.record, self.tree, done)


def origin_of(path: str, mapping: dict[str, str]) -> Origin | None:
    """Where a map takes the parameter `path` from, or None where it does not name it."""
    roots = [root for root in mapping if within(path, root)]
    if not roots:
        return None
    root = max(roots, key=len)
    there, cut = _split(mapping[root])
    return Origin("/".join(part for part in (there, path[len(root) :].lstrip("/")) if part), cut)


def within(path: str, root: str) -> bool:
    """Whether `path` is `root` or lies under it."""
    return root == "" or path == root or path.startswith(f"{root}/")


def checkpoint_in(source: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path:
    """The newest intact checkpoint in a run directory or its `checkpoints`, or `source` itself if it is one."""
    files.quieten_orbax()
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    candidates = [folder / str(step) for step in reversed(files.steps(folder))]
    for candidate in candidates or [source]:
        damage = manifest.damage(candidate)
        if damage is None:
            return candidate
        say(f"checkpoint {candidate} is damaged: {damage}")
    raise UserError(
        f"there is no intact checkpoint in {source}: give a run directory, or a directory checkpoints/STEP of one"
    )


def _split(text: str) -> tuple[str, Cut | None]:
    """'path[2:6, :3]' -> the path and its cut."""
    whole = CUT.fullmatch(text)
    parts = [] if whole is None or whole["cut"] is None else [PART.fullmatch(part) for part in whole["cut"].split(",")]
    if whole is None or None in parts:
        raise UserError(
            f"{text!r} is no path with a cut behind it: write it like 'embed/table[:2048]' or 'stack[2:6, :]'"
        )
    bounds = tuple(tuple(int(end) if end else None for end in (part["start"], part["stop"])) for part in parts)
    return whole["path"], Cut(bounds) if bounds else None


def _changed(origin: Origin, leaf: Leaf) -> Leaf:
    return leaf if origin.change is None else Leaf(origin.change.shape(leaf.shape), leaf.dtype, leaf.key_impl)


def _as_saved(leaf: jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The abstract leaf with the shape it has on disk; a dimension whose size changes is not sharded."""
    sharding = leaf.sharding
    if shape != leaf.shape and isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        sharding = NamedSharding(
            sharding.mesh,
            PartitionSpec(*(axis if size == new else None for axis, size, new in zip(spec, leaf.shape, shape))),
        )
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
