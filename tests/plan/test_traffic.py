"""The planner's collectives against the formulas that a compiled step was compared with, on every mesh of those."""

import pytest

from maxlike import config
from maxlike.collectives import by_axis
from maxlike.plan import planned, targets
from maxlike.plan.trace import trace
from tests.reference.collectives import sent
from tests.reference.nets import MIXTURE, NET, NETS, OVERLAYS, bindings_of

CPU = targets.Target("cpu:8", "cpu", 8, None, None)


@pytest.fixture(scope="module")
def traces():
    found = {}

    def of(experiment, key):
        return found.setdefault(key, trace(experiment, "cpu"))

    return of


@pytest.mark.parametrize("mesh", OVERLAYS)
def test_the_planner_sends_what_the_formula_says(mesh, traces):
    net = NETS.get(mesh, NET)
    family = "families/moe" if net is MIXTURE else "families/transformer"
    experiment = config.load(family, overlays=[f"mesh/{mesh}"], bindings=bindings_of(mesh))
    predicted = planned.analytic(experiment, CPU, traces(experiment, family))
    ours = by_axis(predicted.collectives)
    theirs = sent(net, dict(experiment.mesh.sizes(8)))
    for key in {*theirs, *ours}:
        small = 0.01 * sum(theirs.values())
        assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=0.05, abs=small), key
