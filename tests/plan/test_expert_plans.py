"""What expert parallelism sends and holds: the planner's formulas against the compiler."""

from types import SimpleNamespace

import pytest

from maxlike import config
from maxlike.collectives import by_axis
from maxlike.plan import layouts, planned, targets
from maxlike.plan.changes import with_mesh, with_remat
from maxlike.plan.compiled import compile_step
from maxlike.plan.dispatched import mixtures
from maxlike.plan.memory import rows_a_device
from maxlike.plan.trace import trace

# Wide rows of few experts each, so that what dispatch sends and holds is most of what there is.
MIXTURE = [
    "dim = 256",
    "depth = 4",
    "heads = 8",
    "width = 512",
    "expert_width = 64",
    "experts.Experts.count = 8",
    "experiment.Experiment.batch_size = 32",
    "experiment.Experiment.sequence_length = 128",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "experiment.Experiment.hooks = ()",
]
CPU = targets.Target("cpu:8", "cpu", 8, None, None)
GATHER = (
    "from layers import dispatch",
    "moe.MoE.dispatch = @dispatch.Dropless",
    "dispatch.Dropless.exchange = 'gather'",
)
ROOM = (*GATHER[:2], "dispatch.Dropless.room = 2.0")


def planned_and_compiled(bindings, remat):
    experiment = config.load("families/moe", bindings=[*MIXTURE, *bindings])
    experiment = with_mesh(with_remat(experiment, remat), {"fsdp": 2, "expert": 4})
    predicted = planned.analytic(experiment, CPU, trace(experiment, "cpu"))
    return predicted, compile_step(experiment, experiment.mesh.open(), "cpu")


@pytest.mark.parametrize(
    ("bindings", "remat"),
    [
        ((), "none"),
        pytest.param(ROOM, "full", marks=pytest.mark.large),
        pytest.param(GATHER, "none", marks=pytest.mark.large),
    ],
)
def test_formulas_agree_with_the_compiler(bindings, remat):
    predicted, made = planned_and_compiled(bindings, remat)
    assert predicted.memory.arguments == made.arguments
    theirs, ours = by_axis(made.collectives), by_axis(predicted.collectives)
    for key in {*theirs, *ours}:
        small = 5e-3 * sum(theirs.values())
        assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=0.1, abs=small), (key, ours, theirs)
    assert predicted.memory.peak == pytest.approx(made.peak, rel=0.25), predicted.memory


def rows_of(bindings: tuple[str, ...], shape: dict[str, int]) -> tuple[str, float, float, float]:
    """(kind, places, choices, gathered) of the one mixture, in units of the tokens of a device."""
    experiment = with_mesh(config.load("families/moe", bindings=[*MIXTURE, *bindings]), shape)
    shares = layouts.Shares(experiment, layouts.abstract_layout(experiment, 8))
    rows = rows_a_device(experiment, shares)
    # Of the trace the number of active parameters alone is read, and that where experts choose tokens.
    (mixture,) = mixtures(experiment, shares, SimpleNamespace(active=0.0), rows)
    tokens = rows * experiment.sequence_length / shares.context
    return (mixture.kind, *(rows / tokens for rows in (mixture.places, mixture.choices, mixture.gathered)))


def test_places_follow_room_exchange_and_capacity():
    """2 choices of 8 experts on 4 devices, 2 on each: the worst case is 2 rows a token and device."""
    capacity = (*GATHER[:1], "moe.MoE.dispatch = @dispatch.Capacity", "dispatch.Capacity.factor = 1.25")
    shape = {"data": 2, "expert": 4}
    assert rows_of((), shape) == ("all_to_all", 8, 2, 0)
    assert rows_of(ROOM, shape) == ("all_to_all", 4, 2, 0)  # twice the balanced load of 2
    assert rows_of((*ROOM[:2], "dispatch.Dropless.room = 9.0"), shape) == ("all_to_all", 8, 2, 0)  # never more
    assert rows_of(GATHER, shape) == ("gather", 8, 2, 4)
    assert rows_of(capacity, shape) == ("all_to_all", 2.5, 2.5, 0)
    assert rows_of((), {"expert": 8}) == ("all_to_all", 8, 2, 0)  # one expert a device: one choice of a token at most
    # Rows cut along their length: capacities are of whole rows, and the served go as dropless ones.
    assert rows_of(capacity, {"expert": 4, "context": 2})[:2] == ("all_to_all", 8)
