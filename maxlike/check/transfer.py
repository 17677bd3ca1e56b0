"""The row about weights of other libraries: what is written and read back is the model."""

import json
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from maxlike import checkpoint_tree
from maxlike.check.compare import Comparison, Record, compare
from maxlike.check.subject import Subject
from maxlike.check.variant import LeftOut, Row
from maxlike.convert import ahead, export_job, families, proof, transfer
from maxlike.convert.import_job import filled
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensor_files import TensorFiles
from maxlike.model import AbstractModel

SHARD_BYTES = 10**9


def export(subject: Subject) -> Iterator[Row]:
    """config.json and safetensors, written and read by an importer that knows nothing but the files: parameters bit for
    bit, and the logits of the network that config.json describes."""

    def judge() -> Comparison:
        try:
            family, config = export_job.describe(subject.structure)
        except Cannot as error:
            raise LeftOut(f"no Hugging Face family: {_shortest(str(error))}") from error
        with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
            directory = pathlib.Path(folder)
            (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
            leaves = dict(subject.leaves)
            transfer.store(
                family, subject.structure, leaves, directory=directory, dtype="float32", shard_bytes=SHARD_BYTES
            )
            return compare(*_read_back(subject, directory), 0.0)

    yield subject.row("export", "exported and imported again against the model", judge)


def _read_back(subject: Subject, directory: pathlib.Path) -> tuple[Record, Record]:
    """(what an importer makes of the files, the model)."""
    family, factory, _ = families.read(directory, mtp=ahead.count(subject.structure) > 0)
    imported = AbstractModel.of(factory)
    structure = Structure(imported.merge(imported.params, imported.buffers))
    shapes = ({"network": _shapes(net)} for net in (structure, subject.structure))
    one, other = next(shapes), next(shapes)
    if compare(one, other, 0.0).first is not None:  # the files need not even hold what such a network wants
        return one, other
    here = SingleDeviceSharding(jax.devices()[0])
    flat = checkpoint_tree.flatten(imported.params) | checkpoint_tree.flatten(imported.buffers)
    wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in flat.items()}
    loaded = transfer.load(TensorFiles(directory), family, structure, wanted)
    own = {path: leaf for path, leaf in subject.leaves.items() if path in wanted}
    leaves = own | loaded  # a buffer that the files do not know is not theirs to change
    tokens = proof.probe(subject.network)
    base = subject.base.experiment.abstract_model()
    pairs = ((imported, structure, leaves), (base, subject.structure, subject.leaves))
    records = [
        {
            "parameters": _by_layer(net, leaves),
            "output": {
                "logits": proof.logits(model.graph, filled(model.params, leaves), filled(model.buffers, leaves), tokens)
            },
        }
        for model, net, leaves in pairs
    ]
    return one | records[0], other | records[1]


def _shapes(net: Structure) -> dict[str, np.ndarray]:
    """An empty array of the shape of each layer's parameter."""
    return {path: np.zeros((0, *parameter.shape)) for path, parameter in net.parameters.items()}


def _by_layer(net: Structure, leaves: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Each layer's parameter without the vocabulary's padding, which files do not hold."""
    return {
        path: np.asarray(leaves[p.leaf])[p.index][tuple(slice(n) for n in p.shape)]
        for path, p in net.parameters.items()
    }


def _shortest(text: str) -> str:
    """What stands in the way: the nearest family and the first line of how it would differ."""
    lines = [re.sub(r"\s{2,}", ", ", line.strip()) for line in text.splitlines()[1:] if not line.startswith("where ")]
    return " ".join(lines[:2])
