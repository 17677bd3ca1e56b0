"""What a compiled program sends between devices: its collectives by kind, mesh axes, bytes and number of executions.

Read from the text of the compiled program (`Compiled.as_text()`), so it is what runs and not what was asked for.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import numpy as np

from maxlike.hlo import Computation, HloModule, Instruction

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    axes: mesh axes along which it moves data, in the order of the mesh. bytes: what a device sends in one execution, by
    the convention of rings: all-gather and reduce-scatter of a full array X over n devices X (n - 1) / n, all-reduce
    twice that, all-to-all X (n - 1) / n of the local array, collective-permute X. times: executions a run of the
    program, the trip counts of all loops around it multiplied. name: where it comes from in the traced program.
    """

    kind: Kind
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    times: int
    name: str


def collectives(hlo_text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of a compiled program that ran through the partitioner on `mesh`, in the order of the program.

    The halves of an asynchronous collective count once, and so do the pieces that a TPU spreads over several fusions
    with other work (they share a chain). Of the branches of a conditional the one that sends most counts. What stays on
    its device (a group of one) does not count.

    Raises ValueError for a collective in a loop whose trip count the text does not determine, and for groups of devices
    that are not written in a known form.
    """
    module = HloModule.parse(hlo_text)
    return list(_walk(module, module.computations[module.entry], [], 1, mesh, set()))


def by_axis(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
    """(kind, axes) -> bytes a device sends in one run of the program."""
    sums = collections.Counter()
    for collective in found:
        sums[collective.kind, collective.axes] += collective.bytes * collective.times
    return dict(sorted(sums.items()))


def _walk(
    module: HloModule,
    computation: Computation,
    arguments: list[Any],
    times: int | None,
    mesh: jax.sharding.Mesh,
    chains: set[tuple[str, str]],
) -> Iterable[Collective]:
    """The collectives of a computation that runs `times` times (None: nobody knows) with `arguments`. chains: those
    whose first piece has been seen."""
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
        if kind in get_args(Kind):
            chain = tuple(instruction.find(rf'{name}="?(\d+)') for name in ("chain_id", "channel_id"))
            if chain in chains:
                continue
            if chain[0] is not None:
                chains.add(chain)
            for collective in _measure(computation, instruction, kind, mesh):
                if times is None:
                    raise ValueError(f"{instruction.name} runs in a loop whose trip count the program does not state")
                yield dataclasses.replace(collective, times=times)
        elif instruction.opcode == "while":
            count, carry = module.loop(computation, instruction, arguments)
            for part, runs in (("condition", 1), ("body", 0)):
                inner = module.computations[instruction.find(rf"(?:^|, ){part}=%?([\w.\-]+)")]
                each = None if count is None or times is None else times * (count + runs)
                yield from _walk(module, inner, [carry], each, mesh, chains)
        elif instruction.opcode == "conditional":
            branches = [list(_walk(module, c, [], times, mesh, chains)) for c in _branches(module, instruction)]
            yield from max(branches, key=lambda found: sum(c.bytes * c.times for c in found))
        elif instruction.opcode not in ("async-done", "async-update"):
            called = None
            if "calls=" in instruction.attributes or "to_apply=" in instruction.attributes:  # few have them
                called = instruction.find(r"(?:^|, )(?:calls|to_apply)=%?([\w.\-]+)")
            if called is not None:
                calls = instruction.opcode == "call"  # no other holds a loop
                values = [module.value(computation, name, arguments) for name in instruction.operands if calls]
                found = _walk(module, module.computations[called], values, times, mesh, chains)
                yield from map(_scattered, found) if called.startswith("all-reduce-scatter") else found


def _branches(module: HloModule, conditional: Instruction) -> list[Computation]:
    listed = conditional.find(r"branch_computations=\{([^}]*)\}")
    if listed is None:
        names = [conditional.find(rf"{side}_computation=%?([\w.\-]+)") for side in ("true", "false")]
    else:
        names = [name.strip().removeprefix("%") for name in listed.split(",")]
    return [module.computations[name] for name in names]


def _scattered(collective: Collective) -> Collective:
    """A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice, and names it so."""
    if collective.kind != "all-reduce":
        return collective
    return dataclasses.replace(collective, kind="reduce-scatter", bytes=collective.bytes // 2)


def _measure(
    computation: Computation, instruction: Instruction, kind: Kind, mesh: jax.sharding.Mesh
) -> Iterable[Collective]:
    """The collective of an instruction, one for each dtype that it carries; none where nothing leaves its device."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.find(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}"))
        groups = [(int(a), int(b)) for a, b in pairs if a != b]
        size = 2
    else:
        groups = _groups(instruction, mesh.size)
        size = len(groups[0])
    if not groups or size == 1:
        return
    factor = {
        "all-gather": size - 1.0,  # of the local part, which is X / size
        "reduce-scatter": (size - 1) / size,
        "all-reduce": 2 * (size - 1) / size,
        "all-to-all": (size - 1) / size,
        "collective-permute": 1.0,
    }[kind]
    operands = instruction.operands
    if instruction.opcode.startswith("ragged") or (kind == "collective-permute" and _in_place(computation, operands)):
        operands = operands[:1]  # the others say where to
    sizes = collections.Counter()
    for operand in operands:
        for dtype, count in _arrays(computation.instructions[operand].type):
            sizes[dtype] += count
    name = instruction.find(r'op_name="([^"]*)"') or instruction.name
    for dtype, count in sizes.items():
        yield Collective(kind, _axes(groups, mesh), dtype, round(count * factor), 1, name)


def _in_place(computation: Computation, operands: list[str]) -> bool:
    """Whether a permute has the form (input, output, place in it, place in it)."""
    return len(operands) == 4 and "s32[]" in computation.instructions[operands[3]].type


def _arrays(type_text: str) -> Iterable[tuple[str, int]]:
    """(dtype, bytes) of each array in a type."""
    for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", type_text):
        bits = 8 if dtype == "pred" else int(re.match(r"[a-z]+(\d+)", dtype)[1])
        yield dtype, math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _axes(groups: list[tuple[int, ...]], mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes on which devices of one group differ. Devices are numbered in the order of the mesh."""
    members = np.array(groups)
    if members.max() >= mesh.size:
        raise ValueError(f"the program runs on more devices than the mesh of {mesh.size} that it is read with")
    coordinates = np.unravel_index(members, tuple(mesh.shape.values()))
    return tuple(name for name, c in zip(mesh.shape, coordinates) if (c != c[:, :1]).any())


def _groups(instruction: Instruction, devices: int) -> list[tuple[int, ...]]:
    """Groups of devices in any of the three forms in which XLA writes them: a list, an iota, axes of a mesh."""
    text = instruction.find(r"replica_groups=(.*)")
    if text is None or text.startswith("{}"):
        return [tuple(range(devices))]
    if text.startswith("{{"):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\d[\d,]*", text[: text.index("}}")])]
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _rows(_iota(iota[2]).reshape(_numbers(iota[1])))
    if named := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}", text):
        return _mesh_groups(*named.groups())
    raise ValueError(f"{instruction.name}: its replica groups are in no known form: {text[:80]}")


def _mesh_groups(sizes: str, ids: str | None, chosen: str) -> list[tuple[int, ...]]:
    """Of `'a'=4,'b'=2`, the devices in the order of these axes (None: counted), and the axes of a group such as `'b'`
    or `'a':(2)2`, a part of 'a' (in brackets the product of what is major to it)."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    wanted = [(name, int(major or 1), int(size or mesh[name])) for name, major, size in parts]
    dims, inner = [], []  # every axis cut where a part of it begins or ends; the dimensions inside a group
    for name, size in mesh.items():
        cuts = sorted({1, size, *(c for n, major, part in wanted if n == name for c in (major, major * part))})
        for low, high in itertools.pairwise(cuts):
            if any(n == name and major <= low and high <= major * part for n, major, part in wanted):
                inner.append(len(dims))
            dims.append(high // low)
    count = math.prod(dims)
    devices = np.arange(count) if ids is None else _iota(ids) if ids.startswith("[") else np.array(_numbers(ids))
    devices = np.moveaxis(devices.reshape(dims), inner, range(-len(inner), 0))
    return _rows(devices.reshape(-1, math.prod(dims[i] for i in inner)))


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2, ... in that shape, transposed, in a row."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _rows(array: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(device) for device in row) for row in array]
