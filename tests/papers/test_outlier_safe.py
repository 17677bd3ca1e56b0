"""papers/outlier_safe: arms are what their rows say and match; the merged network is measured, and exported."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from layers.embed import Embed, Head
from layers.norm import RMSNorm
from maxlike import config, merging
from maxlike.compare.comparison import Comparison
from maxlike.compare.rules import check_arms
from maxlike.convert import families
from maxlike.convert.export_job import describe, export
from maxlike.convert.structure import Structure
from maxlike.errors import UserError
from maxlike.plan import changes, layouts
from maxlike.program import Program
from maxlike.tool import Tool
from maxlike.train import train
from tests import tiny

ARMS = ("adam", "muon_all", "muon", "muon_ssnorm", "muon_embproj", "osp")
TINY = ("dim = 16", "depth = 2", "heads = 2", "width = 32", "rows = 4", "length = 32", "steps = 2")
QUICK = ("stack.Stack.scan = True", "kurtosis.Kurtosis.rows = 4", "quantize_measure.QuantizedLoss.batches = 1")


def load(arm, *overlays):
    return config.load(f"papers/outlier_safe/{arm}", overlays=overlays)


@pytest.fixture(scope="module")
def arms():
    return {arm: load(arm) for arm in ARMS}


def groups(experiment, kind):
    """What the optimizer does with the parameters whose path matches."""
    described = experiment.optimizer.describe(experiment.abstract_model().axes)
    return {text.split()[0] for path, text in described.items() if re.search(kind, path)}


TABLES, MATRICES, GAINS = r"table|head/(head/)?linear", r"mixer/|ffn/|projection", "gain"


@pytest.mark.parametrize(
    ("arm", "tables", "matrices"),
    [("adam", "adamw", "adamw"), ("muon_all", "muon", "muon")] + [(arm, "adamw", "muon") for arm in ARMS[2:]],
)
def test_each_arm_trains_with_what_its_row_says(arms, arm, tables, matrices):
    experiment = arms[arm]
    assert groups(experiment, TABLES) == {tables}
    assert groups(experiment, MATRICES) == {matrices}
    assert groups(experiment, GAINS) == {"adamw"}
    described = experiment.optimizer.describe(experiment.abstract_model().axes)
    decayed = {path for path, text in described.items() if "decay 0.01" in text}
    assert decayed == {path for path in described if "gain" not in path}


@pytest.mark.parametrize("arm", ARMS)
def test_norms_and_projections_of_each_arm(arms, arm):
    network = arms[arm].bare()
    one_gain = arm in ("muon_ssnorm", "osp")
    norms = jax.tree.leaves(network, is_leaf=lambda part: isinstance(part, RMSNorm))
    assert {
        norm.gain.ndim - ("layers" in norm.gain.get_metadata("axes")) for norm in norms if isinstance(norm, RMSNorm)
    } == {0 if one_gain else 1}
    assert isinstance(network.embed, Embed) is isinstance(network.head, Head) is (arm not in ("muon_embproj", "osp"))
    assert not network.head.tied


@pytest.mark.parametrize("overlay", [None, "papers/outlier_safe/h200", "papers/outlier_safe/v5p"])
def test_arms_match_in_flops_and_tokens_at_every_scale(arms, overlay):
    found = arms if overlay is None else {arm: load(arm, overlay) for arm in ARMS}
    flops = [e.bare().flops_per_token(e.sequence_length) for e in found.values()]
    assert max(flops) <= 1.02 * min(flops)
    assert len({(e.steps, e.batch_size, e.sequence_length, e.seed) for e in found.values()}) == 1
    if overlay is not None and overlay.endswith("v5p"):
        shapes = jax.tree.leaves(merging.plain(found["osp"]).abstract_model().params)
        assert sum(x.size for x in shapes) == 1_415_677_952  # the paper's model: nothing is left of the projections


def test_the_rule_names_arms_that_are_there():
    made = config.load("papers/outlier_safe", kind=Comparison)
    assert tuple(made.experiments) == ARMS
    check_arms(made.rule, made.experiments)


def test_the_fullest_arm_is_planned_for_many_devices():
    """Its gains are scalars, its projections ordinary weights between tables."""
    experiment = changes.with_mesh(load("osp", "papers/outlier_safe/v5p"), {"fsdp": 4, "tensor": 2})
    shares = layouts.Shares(experiment, layouts.abstract_layout(experiment, 8))
    kinds = {weight.name: (weight.layers, weight.stored, weight.cut) for weight in shares.weights}
    assert kinds["embed/projection/kernel"] == (1, ("fsdp",), ())
    assert kinds["norm/gain"] == (1, (), ()) and kinds["stack/periods/0/ffn_norm/gain"] == (24, (), ())


def test_nothing_merges_in_a_plain_arm(arms):
    assert merging.plain(arms["adam"]) is arms["adam"]
    assert merging.plain(arms["muon"]) is arms["muon"]
    assert merging.plain(arms["muon_ssnorm"]) is not arms["muon_ssnorm"]


def test_it_is_written_as_an_ordinary_llama(arms):
    family, description = describe(Structure(merging.plain(arms["osp"]).bare()))
    assert family.model_type == "llama" and description["tie_word_embeddings"] is False


class Look(Tool):
    """A tool that keeps what it is called with."""

    def __init__(self):
        self.seen = []

    def check(self, experiment):
        self.seen.append(experiment)

    def __call__(self, experiment, program, state):
        self.seen.append((experiment, program, state))
        return {"looked": 1.0}


def test_tools_see_the_merged_weights(tmp_path):
    experiment = config.load("papers/outlier_safe/osp", bindings=[*TINY, *QUICK])
    program = Program.of(experiment, experiment.mesh.open())
    draw = np.random.default_rng(0)
    state = {
        name: jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), program.state["params"])
        for name in ("params", "ema")
    }
    state |= {"buffers": {}, "step": 2, "seed": 0, "guard": {}}
    look = Look()
    merged = merging.Merged(tools=(look,))
    assert merged(experiment, program, state) == {"looked": 1.0}
    merged(experiment.rerun(seed=1, warm_start=None), program, state)
    (plain, _, after), (again, second, _) = look.seen
    assert again.seed == 1 and again.model is plain.model and second.serves(plain)  # nothing is compiled anew
    assert type(plain.bare().embed) is Embed and "opt" not in after
    for name in ("params", "ema"):
        table, p_in = (
            np.float64(x)
            for x in (state[name]["embed"]["embed"]["table"], state[name]["embed"]["projection"]["kernel"])
        )
        np.testing.assert_allclose(after[name]["embed"]["table"], table @ p_in, rtol=1e-4, atol=1e-4)
        gains = state[name]["stack"]["periods"][0]["mixer_norm"]["gain"]
        np.testing.assert_array_equal(
            after[name]["stack"]["periods"][0]["mixer_norm"]["gain"], np.stack([gains] * 16, 1)
        )


def test_checks(arms):
    with pytest.raises(UserError, match="tools is empty"):
        merging.Merged(tools=())
    look = Look()
    merging.Merged(tools=(look,)).check(arms["osp"])  # before training a tool may refuse, and what it sees is merged
    assert type(look.seen[0].bare().embed) is Embed


@pytest.mark.large
def test_a_trained_arm_is_measured_and_exported_as_a_llama(tmp_path, capsys):
    experiment = config.load("papers/outlier_safe/osp", bindings=[*TINY, *QUICK])
    train(experiment, tmp_path / "run")
    (measured,) = tiny.rows(tmp_path / "run", "measured")
    wanted = ("kurtosis", "loss_w4a4kv4", "loss_rise_w4a4kv4", "loss_rise_w4a4kv4_had")
    assert all(np.isfinite(measured[name]) for name in wanted)
    export(experiment, tmp_path / "run", destination=str(tmp_path / "llama"))
    assert "merged what only training needs" in capsys.readouterr().out
    family, factory, written = families.read(tmp_path / "llama")
    assert family.model_type == "llama" and written["hidden_size"] == 16
    shapes = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0)))[1])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(
        x.size for x in jax.tree.leaves(merging.plain(experiment).abstract_model().params)
    )
