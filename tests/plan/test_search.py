"""What `--search` finds can be run: stages and rows cut along their length among it."""

import math
import shlex

import jax
import numpy as np
import pytest

from maxlike import config
from maxlike.bench.timed import random_batch
from maxlike.errors import UserError
from maxlike.plan import candidates, planned, ranking, targets
from maxlike.plan.changes import with_mesh, with_pipeline
from maxlike.plan.plan import plan
from maxlike.plan.trace import trace
from maxlike.program import Program

TINY = [
    "vocab = 256",
    "dim = 32",
    "depth = 4",
    "heads = 2",
    "width = 64",
    "experiment.Experiment.batch_size = 8",
    "experiment.Experiment.sequence_length = 512",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "experiment.Experiment.hooks = ()",
    "stack.Stack.scan = True",
]
V5E = targets.find(None, "v5e", 8)


def load(*bindings: str, overlays: tuple[str, ...] = ()):
    return config.load("families/transformer", overlays=overlays, bindings=[*TINY, *bindings])


def shapes(experiment, devices: int = 8) -> list[dict[str, int]]:
    return list(candidates.meshes(experiment, devices, "tpu"))


def sizes(experiment, axis: str, devices: int = 8) -> set[int]:
    return {shape.get(axis, 1) for shape in shapes(experiment, devices)}


def step(how: str, *bindings: str):
    """(the experiment that the words of a command line make, its mesh, the loss of a step on simulated devices)."""
    words = shlex.split(how)
    said = {"--overlay": [], "--set": []}
    for flag, word in zip(words[::2], words[1::2], strict=True):
        said[flag].append(word)
    experiment = load(*bindings, *said["--set"], overlays=tuple(said["--overlay"]))
    program = Program.of(experiment, experiment.mesh.open())
    batch = random_batch(experiment, 256)
    run = program.lower_step(batch).compile()
    allow = jax.device_put(np.bool_(True), program.layout.replicated)
    _, metrics = run(program.init(), program.put(batch), allow)
    return experiment, dict(program.layout.mesh.shape), float(metrics["loss"])


@pytest.mark.parametrize(
    ("axis", "small"),
    [
        ("stage", ("depth = 2", "experiment.Experiment.sequence_length = 64")),
        ("context", ("depth = 2", "experiment.Experiment.batch_size = 4")),
    ],
)
def test_what_is_found_is_run_by_the_words_that_it_says(axis, small, monkeypatch):
    monkeypatch.setattr(candidates, "REMAT", ("full",))
    found = ranking.evaluate(load(*small), V5E)
    of_axis = {key: made for key, made in found.items() if axis in dict(key[0])}
    best = ranking.rank(load(*small), V5E, 1, of_axis)[0]
    told = best.plain()
    assert (told["pipeline_micro_batches"] is not None) == (axis == "stage")
    experiment, mesh, loss = step(told["how"], *small)
    assert mesh == told["mesh"] and math.prod(mesh.values()) == 8
    assert experiment.step.micro_batches == told["micro_batches"]
    again = planned.analytic(experiment, V5E, trace(experiment, "tpu"))
    assert (again.time, again.memory) == (best.plan.time, best.plan.memory)
    assert loss == pytest.approx(math.log(256), rel=0.05)


def test_more_devices_than_rows_are_used_by_cutting_the_rows():
    """Two heads and two rows leave nothing else for eight devices."""
    experiment = load("experiment.Experiment.batch_size = 2", "depth = 3")
    assert {shape.get("context", 1) for shape in shapes(experiment)} == {1, 2, 4}
    best = ranking.rank(experiment, V5E, 1)[0]
    assert best.plan.shares.context > 1


def test_sizes_of_stages_and_context():
    assert sizes(load(), "stage") == {1, 2, 4}  # powers of two that divide the depth
    assert sizes(load("depth = 3"), "stage") == {1}
    assert sizes(load(), "context") == {1}  # enough rows, and short ones
    assert sizes(load("experiment.Experiment.sequence_length = 8192"), "context") == {1, 2, 4}
    odd = load("experiment.Experiment.sequence_length = 8190", "sharding.Mesh.balance = True")
    assert sizes(odd, "context") == {1}  # half of it is odd: head-tail order cannot be
    one_f_one_b = load("experiment.Experiment.sequence_length = 4096", overlays=("mesh/pipeline_1f1b",))
    assert sizes(one_f_one_b, "stage") == {2, 4}  # it has no step without stages
    assert sizes(one_f_one_b, "context") == {1, 2}


def test_a_pipeline_keeps_its_own_knobs():
    own = load("micro_batches = 2", overlays=("mesh/pipeline_repeats",))
    shares = planned.Placed.of(with_mesh(own, {"stage": 2, "data": 4}), 8).shares
    assert candidates.own_ticks(own) == 2 and candidates.ticks(own, shares, 1, 2) == [2]
    made = with_pipeline(load(), 1)
    shares = planned.Placed.of(with_mesh(made, {"stage": 2, "data": 4}), 8).shares
    assert candidates.ticks(load(), shares, 1, None) == [2]  # two rows on each of four devices
    wide = load("experiment.Experiment.batch_size = 256")
    assert candidates.ticks(wide, shares, 1, None) == [32, 16, 8]
    assert candidates.ticks(wide, shares, 4, None) == [16, 8]


def test_what_a_step_refuses_is_not_ranked(monkeypatch):
    """Rows of 516 tokens divide over 4 devices, and not into the 8 pieces of head-tail order."""
    monkeypatch.setattr(candidates, "REMAT", ("none",))
    experiment = load(
        "experiment.Experiment.batch_size = 2",
        "experiment.Experiment.sequence_length = 516",
        "sharding.Mesh.balance = True",
    )
    found = ranking.evaluate(experiment, V5E)
    two, four = ({k: v for k, v in found.items() if dict(k[0]).get("context") == n and v.fits} for n in (2, 4))
    assert two and four
    with pytest.raises(UserError, match=r"is refused, the fastest so: Mesh\.balance = True cannot be"):
        ranking.rank(experiment, V5E, 1, four)
    ranked = ranking.rank(experiment, V5E, 1, four | two)
    assert ranked[0].plan.shares.context == 2


def test_a_mesh_that_does_not_divide_is_no_end_of_a_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(candidates, "REMAT", ("none",))
    experiment = with_mesh(load("experiment.Experiment.batch_size = 4", "depth = 3"), {"fsdp": -1})
    told = plan(experiment, tmp_path, hardware="v5e", devices=8, search=True, top=1)
    assert told["mesh"] == told["search"][0]["mesh"]
    printed = capsys.readouterr().out
    assert "the experiment's own mesh cannot be: a micro-batch of 4 rows" in printed
    assert f"to run the first: {told['search'][0]['how']}" in printed
