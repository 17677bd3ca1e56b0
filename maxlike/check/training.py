"""Rows about training: one way to compute losses and gradients against another."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from layers import kernels
from layers.context import ReadsFuture
from layers.dispatch import Capacity
from layers.mixture_of_depths import MixtureOfDepths
from layers.moe import MoE
from layers.parts import parts
from maxlike import catalog
from maxlike.check import documents
from maxlike.check.compare import METRICS, Comparison, Record, compare
from maxlike.check.subject import Subject
from maxlike.check.variant import LeftOut, Row, Variant
from maxlike.errors import UserError
from maxlike.objectives.masked_tokens import MaskedTokens
from maxlike.objectives.next_token import NextToken
from maxlike.objectives.reconstruction import Reconstruction

EXACT = 1e-5  # of a tensor's magnitude, float32: the same sums in another order
# The implementation of each operation that is closest to its formula.
PLAINEST = {
    "attention": "xla",
    "recurrence": "scan",
    "grouped_matmul": "ragged_dot",
    "dual_chunk": "whole",
    "context_attention": "gather",
}
ELSEWHERE = ("layers",)  # the row `scan`
NEEDS = {"cudnn": "a GPU"}
NOT_MESHES = ("mesh/rules", "mesh/single")
WHOLE_BATCH = ("loss", "bits_per_byte", "grad_norm")  # metrics that are sums over tokens, however these are grouped


def mesh_overlays() -> dict[str, tuple[str, ...]]:
    """{row: overlays} of the meshes of several devices: every overlay of that folder, and the experiment's own."""
    names = [name for name in catalog.names("overlay") if name.startswith("mesh/") and name not in NOT_MESHES]
    return {name: (name,) for name in names} | {"mesh/own": ()}


def meshes(subject: Subject) -> Iterator[Row]:
    """Each mesh against one device; where a mesh brings an operation of its own, its implementations on that mesh."""
    for name, overlays in mesh_overlays().items():
        if subject.wants(name):
            yield from _mesh(subject, name, overlays)


def on_mesh(subject: Subject, overlays: tuple[str, ...]) -> tuple[Variant, Variant, str]:
    """`Subject.on_mesh`; where stages work on micro-batches, without what is no sum over tokens."""
    try:
        staged = subject.variant((), overlays).staged
    except UserError as refusal:
        raise LeftOut(f"refused: {refusal}") from refusal
    if staged:
        need_sums(subject)
    lines, remark = by_token_alone(subject) if staged else ([], "")
    variant, single, where = subject.on_mesh(overlays, lines)
    return variant, single, "; ".join(filter(None, (where, remark)))


def _mesh(subject: Subject, name: str, overlays: tuple[str, ...]) -> Iterator[Row]:
    used: list[tuple[Variant, Variant, str]] = []

    def judge() -> Comparison:
        used.append(on_mesh(subject, overlays))
        variant, single, _ = used[0]
        if variant.staged:
            return subject.against(variant, single, EXACT, _totals)
        return subject.against(variant, single, EXACT)

    row = subject.row(name, f"loss and gradients on {name} against one device", judge)
    if not used:
        yield row
        return
    variant, single, remark = used[0]
    if row.result is not None and not row.failed:
        row = dataclasses.replace(row, note="; ".join(filter(None, (remark, row.note))))
    yield row
    for op in sorted(_ops(subject, variant) - _ops(subject, single)):
        for implementation in _others(op):
            row_name = f"kernels/{name.removeprefix('mesh/')}/{op}={implementation}"
            if subject.wants(row_name):
                yield _implementation(subject, variant, row_name, f" on {name}")


def implementations(subject: Subject) -> Iterator[Row]:
    """Each implementation of each operation that the twin uses against the plainest one."""
    used = _ops(subject, subject.base)
    for op in sorted(used):
        for implementation in _others(op):
            if subject.wants(f"kernels/{op}={implementation}"):
                yield _implementation(subject, subject.base, f"kernels/{op}={implementation}", "")
    if not used:
        yield Row("kernels", "implementations", None, "no operation of it has a choice of them", failed=False)


def _ops(subject: Subject, variant: Variant) -> set[str]:
    """The operations of the variant's step that have a choice of implementations."""
    return {op for op in subject.taken(variant) if len(kernels.IMPLEMENTATIONS.get(op, ())) > 1} - {*ELSEWHERE}


def _others(op: str) -> list[str]:
    return [name for name in kernels.IMPLEMENTATIONS[op] if name != PLAINEST.get(op, kernels.IMPLEMENTATIONS[op][0])]


def _implementation(subject: Subject, variant: Variant, row: str, where: str) -> Row:
    """The row named `.../OP=IMPLEMENTATION`."""
    op, _, implementation = row.rpartition("/")[2].partition("=")
    plain = PLAINEST.get(op, kernels.IMPLEMENTATIONS[op][0])

    def judge() -> Comparison:
        if implementation in NEEDS:
            raise LeftOut(f"needs {NEEDS[implementation]}")
        return subject.against(*(subject.choosing(variant, op, name) for name in (implementation, plain)), EXACT)

    return subject.row(row, f"against {plain}{where}", judge)


def scan(subject: Subject) -> Iterator[Row]:
    """The stack as a loop over its periods against every layer written out."""

    def judge() -> Comparison:
        if "layers" not in subject.taken(subject.base):
            raise LeftOut("the network has no Stack")
        return subject.against(subject.base, subject.choosing(subject.base, "layers", "unrolled"), EXACT)

    yield subject.row("scan", "scanned layers against unrolled ones", judge)


def remat(subject: Subject) -> Iterator[Row]:
    """Each rematerialisation against keeping everything."""
    present = dict.fromkeys(["full", *subject.bindings.values("remat", "Stack")])
    for policy in [policy for policy in present if policy != "none"]:
        name = f"remat/{policy}"

        def judge(policy: str = policy) -> Comparison:
            if not subject.bindings.values("remat", "Stack"):
                raise LeftOut("the network has no Stack")
            one, other = (
                subject.variant(subject.bindings.override("Stack", "remat", value)) for value in (policy, "none")
            )
            return subject.against(one, other, EXACT)

        if subject.wants(name):
            yield subject.row(name, f"Stack.remat={policy!r} against 'none'", judge)


def accumulation(subject: Subject) -> Iterator[Row]:
    """Two micro-batches against one batch."""
    lines, remark = by_token_alone(subject)

    def judge() -> Comparison:
        need_sums(subject)
        one = subject.variant([*lines, *subject.bindings.override("Step", "micro_batches", 2)])
        other = subject.variant(lines)
        return subject.against(one, other, EXACT, _totals)

    yield subject.row("accumulation", "2 micro-batches against one batch", judge, remark)


def packed(subject: Subject) -> Iterator[Row]:
    """Documents packed into rows against each in a row of its own."""
    lines, remark = by_token_alone(subject)

    def judge() -> Comparison:
        experiment, network = subject.base.experiment, subject.network
        if "segment_ids" not in subject.batches[0]:
            raise LeftOut("its rows are no packed documents")
        if parts(network, ReadsFuture) or parts(network, MixtureOfDepths):
            raise LeftOut("its layers choose among the tokens of a row, so they see what a row is packed of")
        if any(isinstance(part.dispatch, Capacity) for part in parts(network, MoE)):
            raise LeftOut("dispatch.Capacity drops choices by the row")
        variant = subject.variant(lines)
        together, alone, places = documents.packed_and_separate(
            vocab=network.vocab, rows=experiment.batch_size, length=experiment.sequence_length
        )

        def layers() -> Comparison:
            return compare(*_hidden(subject, variant, together, alone, places), EXACT)

        if not isinstance(experiment.objective, NextToken):  # another objective draws noise by the place in a batch
            return layers()
        losses = compare(_totals(subject.run(variant, [together])), _totals(subject.run(variant, [alone])), EXACT)
        located = losses if losses.first is None else layers()
        return losses if located.first is None else located

    yield subject.row("packed", "packed documents against separate ones", judge, remark)


def _hidden(
    subject: Subject, variant: Variant, together: dict, alone: dict, places: np.ndarray
) -> tuple[Record, Record]:
    """What the layers give for the real tokens of packed rows, and for the same tokens in rows of their own."""
    real_BT = together["segment_ids"] > 0
    row, position = np.moveaxis(places[real_BT], -1, 0)
    packed_outputs, alone_outputs = subject.forward(variant, together), subject.forward(variant, alone)
    return (
        {"output": {name: x[real_BT] for name, x in packed_outputs.items()}},
        {"output": {name: x[row, position] for name, x in alone_outputs.items()}},
    )


def need_sums(subject: Subject) -> None:
    """Raises LeftOut for an objective that micro-batches do not add up to."""
    objective = subject.base.experiment.objective
    if isinstance(objective, MaskedTokens):
        raise LeftOut("MaskedTokens draws its masks anew for every micro-batch")
    if not isinstance(objective, NextToken | Reconstruction):
        raise LeftOut(f"{type(objective).__name__} is no sum over tokens, so micro-batches do not add up to the batch")


def by_token_alone(subject: Subject) -> tuple[list[str], str]:
    """(bindings, remark): without what depends on how tokens are grouped into rows and micro-batches, which is no sum
    over tokens: losses of routers, and noise."""
    lines = subject.bindings.override("MoE", "losses", ())
    remark = "without the losses of its routers, which are no sum over tokens" if lines else ""
    lines += subject.bindings.override("TopK", "jitter", 0.0)
    lines += subject.bindings.override("ModalityMoE", "router_noise", "none")
    return lines + subject.bindings.override("ModalityMoE", "routing_scope", "sequence"), remark


def _totals(record: Record) -> Record:
    """A record without the metrics that depend on how tokens are grouped."""
    return {
        section: {n: x for n, x in values.items() if n in WHOLE_BATCH} if section.startswith(METRICS) else values
        for section, values in record.items()
    }
