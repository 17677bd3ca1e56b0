"""Parameters between a checkpoint's files and a model's arrays, a piece at a time."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from maxlike import checkpoint_tree
from maxlike.checkpoint_tree import Leaf
from maxlike.convert import tensor_files
from maxlike.convert.family import Family
from maxlike.convert.structure import Structure
from maxlike.convert.tensor_files import TensorFiles
from maxlike.convert.tensors import Tensor, expand
from maxlike.errors import UserError

Place = tuple[Tensor, int]  # a tensor of the file, and which of its parameters


def load(files: TensorFiles, family: Family, net: Structure, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    """{leaf: array} for the leaves of a model that the family has names for, as `abstract` places them.

    abstract: {leaf: jax.ShapeDtypeStruct with sharding}. Each device's piece is assembled from the tensors that it
    needs, so beside the model itself one piece and the tensors it is made of are in memory. Rows of a padded
    vocabulary are zero.
    Raises UserError with a table where tensors are missing, left over or of another shape.
    """
    tensors = {}
    for name, tensor in expand(family.tensors, net).items():
        name, added = _name(files, family, name), _name(files, family, tensor.added)
        tensors[name] = dataclasses.replace(tensor, name=name, added=added)
    _check(files, family, net, tensors)
    places: dict[str, dict[tuple[int, ...], Place]] = {}
    for tensor in tensors.values():
        for part, slot in enumerate(tensor.slots):
            places.setdefault(slot.parameter.leaf, {})[slot.place] = (tensor, part)
    made = {}
    for leaf, held in places.items():
        made[leaf] = _place(files, abstract[leaf], held)
        files.release()
    return made


def store(family: Family, net: Structure, flat: dict[str, jax.Array], **knobs: Any) -> list[str]:
    """Writes the arrays {leaf: array} of a model under the family's names; returns the names of the files.
    knobs: those of `tensor_files.write`: directory, dtype, shard_bytes."""
    tensors = expand(family.tensors, net)
    added = {made.added: (2, made.shape[-1]) for made in tensors.values() if made.added}
    copies = family.copies(net)

    def tensor(name: str) -> np.ndarray:
        if name in added:
            return np.zeros(added[name], np.float32)
        made = tensors[copies.get(name, name)]
        return made.form.store(tuple(_slice(flat[slot.parameter.leaf], slot) for slot in made.slots))

    shapes = {name: made.shape for name, made in tensors.items()} | added
    shapes |= {name: shapes[other] for name, other in copies.items()}
    exact = {name for name, made in tensors.items() if made.exact}
    return tensor_files.write(shapes=shapes, tensor=tensor, exact=exact, **knobs)


_at = jax.jit(lambda leaf, place: leaf[place])  # the place is traced: one program for all layers of a stack


def _slice(leaf: jax.Array, slot) -> np.ndarray:
    """One layer's parameter on the host, without the vocabulary's padding."""
    return np.asarray(_at(leaf, slot.place) if slot.place else leaf)[tuple(slice(n) for n in slot.shape)]


def _place(files: TensorFiles, abstract: Any, held: dict[tuple[int, ...], Place]) -> jax.Array:
    """One array of the model. Each piece is filled tensor by tensor, and no tensor outlives the next one's reading."""
    lead = len(next(iter(held)))

    def read(place: tuple[int, ...], out: np.ndarray, spans: list[range]) -> None:
        tensor, part = held[place]
        array = tensor.form.load(files.read(tensor.name), tensor.shapes)[part]
        if tensor.added:
            array = array + files.read(tensor.added)[0]
        wanted = array[tuple(slice(span.start, span.stop) for span in spans)]
        out[tuple(slice(n) for n in wanted.shape)] = wanted  # what is left of `out` is padding of the vocabulary

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        spans = [range(*part.indices(size)) for part, size in zip(index, abstract.shape, strict=True)]
        out = np.zeros([len(span) for span in spans], abstract.dtype)
        for place in itertools.product(*spans[:lead]):
            read(place, out[tuple(i - span.start for i, span in zip(place, spans))], spans[lead:])
        return out

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, piece)


def _name(files: TensorFiles, family: Family, name: str) -> str:
    """The tensor's name in these files, which may leave the family's prefix out."""
    short = name.removeprefix(family.prefix)
    return short if name not in files.leaves and short in files.leaves else name


def _check(files: TensorFiles, family: Family, net: Structure, tensors: dict[str, Tensor]) -> None:
    there = {name: files.leaves[name] for name in tensor_files.without(files.leaves, family.unused(net))}
    copies = family.copies(net)
    for twice, once in (family.tied | copies).items():
        twice, once = _name(files, family, twice), _name(files, family, once)
        if twice in there and twice not in tensors and once in there:
            if not np.array_equal(files.read(twice), files.read(once)):
                why = "the architecture" if twice in copies else "config.json"
                fix = "set LanguageModel.mtp to None" if twice in copies else "set tie_word_embeddings to false there"
                raise UserError(f"{files.directory}: {why} ties {twice} to {once} and their values differ: {fix}")
            del there[twice]
    wanted = {
        name: Leaf(tensor.shape, there[name].dtype if name in there else "float") for name, tensor in tensors.items()
    }
    for tensor in filter(lambda tensor: tensor.added, tensors.values()):
        rows = there[tensor.added].shape[0] if tensor.added in there and there[tensor.added].shape else 2
        dtype = there[tensor.added].dtype if tensor.added in there else "float"
        wanted[tensor.added] = Leaf((rows, tensor.shape[-1]), dtype)
    table = checkpoint_tree.difference(there, wanted)
    if table:
        table = table.replace("in the checkpoint", "in the files     ").replace("in this run", "expected")
        raise UserError(
            f"the tensors in {files.directory} are not those that its config.json describes: bring back the file that "
            f"belongs to them\n{table}"
        )
    odd = [name for name in tensors if there[name].dtype not in tensor_files.DTYPES.values()]
    if odd:
        known = ", ".join(tensor_files.DTYPES.values())
        raise UserError(
            f"{files.directory}: {odd[0]} is {there[odd[0]].dtype}, and only {known} are read: dequantise it first"
        )
