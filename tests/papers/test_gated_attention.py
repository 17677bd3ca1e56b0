"""The arms of papers/gated_attention: equal parameters at every size, one difference each, and what the rules name."""

import jax
import pytest

from layers.attention_gate import AttentionGate
from maxlike import config
from maxlike.compare.comparison import Comparison
from maxlike.hooks import Validate
from maxlike.measure import Measure
from maxlike.program import Program

PAPER = "papers/gated_attention"
TINY = (
    "dim = 16",
    "heads = 2",
    "kv_heads = 2",
    "depth = 2",
    "width = 32",
    "gated_width = 27",
    "experiment.Experiment.sequence_length = 32",
    "gates.Gates.rows = 8",
    "sink.AttentionSink.rows = 8",
    "norms.Norms.rows = 8",
    "held_out/sources.Text.start_byte = -2000",
)


def comparison(name: str) -> Comparison:
    return config.load(name, kind=Comparison)


def load(arm: str, *overlays: str):
    return config.load(f"{PAPER}/{arm}", overlays=[f"{PAPER}/{overlay}" for overlay in overlays], unused="keep")


@pytest.mark.parametrize("size", [(), ("h200",), ("v5p",)], ids=["cpu", "h200", "v5p"])
def test_arms_have_the_same_parameters_and_see_the_same_data(size):
    arms = {arm: load(arm, *size) for arm in comparison(f"{PAPER}_sink").experiments}
    counts = {
        arm: sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params))
        for arm, experiment in arms.items()
    }
    tolerance = 0.002 if size == ("v5p",) else 0.001
    assert all(abs(count / counts["baseline"] - 1) <= tolerance for count in counts.values()), counts
    shapes = {(e.steps, e.batch_size, e.sequence_length, e.seed, e.step.compute_dtype) for e in arms.values()}
    assert len(shapes) == 1
    assert not any(experiment.config.unused for experiment in arms.values())


def gate_of(arm: str) -> dict:
    mixer = load(arm).bare().stack.periods[0].mixer
    if mixer.gate is None:
        return {}
    assert isinstance(mixer.gate, AttentionGate)
    names = ("position", "headwise", "head_shared", "mode", "activation")
    return {name: vars(mixer.gate)[name] for name in names}


def test_each_arm_differs_by_its_gate_alone():
    plain = {"position": "g1", "headwise": False, "head_shared": False, "mode": "mul", "activation": "sigmoid"}
    assert gate_of("baseline") == {}
    assert gate_of("g1_elementwise") == plain
    assert gate_of("g1_headwise") == plain | {"headwise": True}
    assert gate_of("g1_head_shared") == plain | {"head_shared": True}
    assert gate_of("g2_elementwise") == plain | {"position": "g2"}
    assert gate_of("g5_elementwise") == plain | {"position": "g5"}
    assert gate_of("ns_sigmoid") == plain | {"activation": "ns_sigmoid"}


def bindings(arm: str) -> set[str]:
    """Those of classes; of the numbers, an operative configuration holds those in use."""
    return {line for line in load(arm).config.operative.splitlines() if " = " in line and "." in line.split(" = ")[0]}


@pytest.mark.parametrize(("slow", "fast"), [("baseline", "baseline_high_lr"), ("g1_elementwise", "g1_high_lr")])
def test_high_rates_are_three_times_the_others_and_change_nothing_else(slow, fast):
    assert bindings(slow) ^ bindings(fast) == {"schedules.Cosine.lr = %lr", "schedules.Cosine.lr = %high_lr"}
    rates = [load(arm).optimizer.schedule.lr for arm in (slow, fast)]
    assert rates[1] == pytest.approx(3 * rates[0])


def test_the_arms_measure_what_the_rules_and_tables_name():
    experiment = config.load(f"{PAPER}/g1_elementwise", bindings=TINY)
    (hook,) = (hook for hook in experiment.hooks if isinstance(hook, Measure))
    program = Program.of(experiment, experiment.mesh.open())
    found = hook.measured(program, program.init())
    for name in (PAPER, f"{PAPER}_sink"):
        paper = comparison(name)
        asked = {*(criterion.metric for criterion in paper.rule), *paper.metrics}
        assert {metric.removeprefix("measured/") for metric in asked if metric.startswith("measured/")} <= found.keys()
        others = {metric for metric in asked if not metric.startswith("measured/")}
        assert others <= {
            "validation/loss",
            "validation/bits_per_byte",
            "train/loss/area",
            "eta/loss",
            "spikes/loss",
        }
        assert any(isinstance(hook, Validate) for hook in experiment.hooks)
