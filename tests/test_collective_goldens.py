"""The collectives of a compiled training step, by kind and mesh axes: against a formula, and against goldens.

`pytest tests/test_collective_goldens.py -m "meshes or not meshes" --update-goldens` rewrites the goldens.
"""

import collections
import pathlib

import pytest

from maxlike import config
from maxlike.bench.timed import random_batch
from maxlike.collectives import by_axis, collectives
from maxlike.program import Program
from tests.reference.collectives import sent
from tests.reference.nets import NET, NETS, OVERLAYS, bindings_of

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "collectives"
FAST = ("hsdp_tp", "fsdp_context", "expert_fsdp")
MESHES = [pytest.param(mesh, marks=() if mesh in FAST else pytest.mark.meshes) for mesh in OVERLAYS]
# What the formula leaves out: gradients of gains, norms of gradients, metrics. Of all bytes sent.
SMALL = 0.005


def table(found, counts, expected, total) -> str:
    """kind | axes | executions | kilobytes | formula | ratio, a line each, but for what is less than SMALL of all."""
    lines = []
    for key in sorted({*found, *expected}):
        measured, formula = found.get(key, 0), expected.get(key, 0)
        if max(measured, formula) > SMALL * total:
            ratio = f"{measured / formula:.2f}" if formula else "-"
            names = f"{key[0]} | {' '.join(key[1])} | {counts.get(key, 0)}"
            lines.append(f"{names} | {measured / 1000:,.0f} | {formula / 1000:,.0f} | {ratio}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_sends_what_the_formula_says(mesh, request):
    net, bindings = NETS.get(mesh, NET), bindings_of(mesh)
    family = "families/moe" if net.E else "families/transformer"
    experiment = config.load(family, overlays=[f"mesh/{mesh}"], bindings=bindings)
    program = Program.of(experiment, experiment.mesh.open())
    text = program.lower_step(random_batch(experiment, NET.V)).compile().as_text()
    sent_here = collectives(text, program.layout.mesh)
    found, counts = by_axis(sent_here), collections.Counter()
    for collective in sent_here:
        counts[collective.kind, collective.axes] += collective.times
    expected = sent(net, dict(program.layout.mesh.shape))
    total = sum(found.values())
    told = table(found, counts, expected, total)
    path = GOLDENS / f"{mesh}.txt"
    if request.config.getoption("--update-goldens"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told)
    for key in {*found, *expected}:
        slack = max(0.05 * expected.get(key, 0), SMALL * total)
        assert abs(found.get(key, 0) - expected.get(key, 0)) <= slack, f"{key}\n{told}"
    assert path.read_text() == told, f"{path.name} differs: read the difference, then --update-goldens\n{told}"
