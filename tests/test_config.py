"""gin at the edge: what is refused, with which sentence, and that configurations do not leak."""

import pathlib
import re

import jax
import pytest

from maxlike import config
from maxlike.errors import UserError
from maxlike.model import split

TINY = """# A model for tests.
from __gin__ import dynamic_registration
from layers import block
include 'quickstart.gin'
steps = 3
vocab = 2048
dim = 16
stack.Stack.depth = 2
attention.Attention.heads = 2
mlp.GatedMLP.width = 32
experiment.Experiment.batch_size = 2
experiment.Experiment.sequence_length = 16
"""
IMPORTS = """from layers import attention
from layers import mlp
from layers import norm
from layers import stack
from maxlike import experiment
from maxlike.optimizers import adamw
"""
TINY = TINY.replace("from layers import block\n", "from layers import block\n" + IMPORTS)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gin"
    path.write_text(TINY)
    return path


def shape(experiment, *names):
    leaf = experiment.abstract_model().params
    for name in names:
        leaf = leaf[name]
    return leaf.shape


def test_loads_with_overlay_and_binding(tiny):
    experiment = config.load(str(tiny), overlays=["mesh/fsdp"], bindings=["steps = 7", "step.Step.micro_batches = 2"])
    assert experiment.steps == 7 and experiment.step.micro_batches == 2
    assert experiment.mesh.shape == {"fsdp": -1}
    assert experiment.config.doc == "A model for tests."
    assert shape(experiment, "embed", "table") == (2048, 16)


def test_the_operative_configuration_reruns_the_same(tiny, tmp_path):
    first = config.load(str(tiny), bindings=["norm.RMSNorm.eps = 1e-5"])
    again = tmp_path / "config.gin"
    again.write_text(first.config.text())
    second = config.load(str(again))
    assert second.config.operative == first.config.operative
    key = jax.random.key(0)
    a, b = split(first.model, key)[1], split(second.model, key)[1]
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("differs"), a, b)


def test_two_experiments_in_one_process_do_not_see_each_other(tiny):
    narrow = config.load(str(tiny))
    wide = config.load(str(tiny), bindings=["dim = 32", "steps = 9"])
    assert split(narrow.model, jax.random.key(0))[1]["embed"]["table"][...].shape == (2048, 16)
    assert split(wide.model, jax.random.key(0))[1]["embed"]["table"][...].shape == (2048, 32)
    assert (narrow.steps, wide.steps) == (3, 9)


def test_bindings_of_a_job_reach_its_call(tiny):
    job = config.load(str(tiny), job="data", bindings=["inspect.data.rows = 2"]).config.job
    assert job.keywords == {"rows": 2}
    assert config.load(str(tiny), job="data").config.job.keywords == {}


def test_a_replaced_class_leaves_its_knobs_behind(tiny):
    experiment = config.load(
        str(tiny), bindings=["experiment.Experiment.optimizer = @adamw.AdamW()", "adamw.AdamW.weight_decay = 0.0"]
    )
    assert type(experiment.optimizer).__name__ == "AdamW"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "attention.Attention.headz = 3",
            r"tiny.gin:\d+: attention.Attention has no knob 'headz': did you mean 'heads'",
        ),
        ("attentio.Attention.heads = 3", r"tiny.gin:\d+: 'attentio' is not imported: did you mean 'attention'"),
        ("attention.Attentio.heads = 3", r"attention has no 'Attentio': did you mean 'Attention'"),
        ("attention.Attention.heads = 3.5", r"Attention.heads takes int, got 3.5 \(float\)"),
        ("attention.Attention.heads = True", r"Attention.heads takes int, got True \(bool\)"),
        ("block.Block.order = 'prex'", r"takes 'pre' or 'post' or 'sandwich' or 'swin' or 'deepnorm', got 'prex'"),
        ("block.Block.norm = 3", r"Block.norm takes Callable, got 3"),
        ("stack.Stack.pattern = (@block.Block, 3)", r"Stack.pattern takes .*, got"),
        ("mlp.GatedMLP.width = %wdth", r"nothing defines the macro %wdth"),
        ("from layers import atention", r"there is no module 'layers.atention': did you mean 'attention'"),
        ("include 'x.gin'", r"the included file 'x.gin' is neither here nor under experiments/"),
        ("attention.Attention.heads = two", r"`attention.Attention.heads = two` is not a gin statement"),
        ("mlp.MLP.width = 4", r"nothing in this experiment uses `mlp.MLP.width = 4`"),
        ("other/mlp.GatedMLP.width = 4", r"nothing in this experiment uses `other/mlp.GatedMLP.width = 4`"),
        ("idle = 4", r"nothing in this experiment uses `idle = 4`"),
        ("stack.Stack.depth = 3\nstack.Stack.pattern = (@block.Block, @block.Block)", r"multiple of the pattern"),
        ("experiment.Experiment.steps = 0", r"Experiment.steps=0: it must be at least 1"),
        ("attention.Attention.heads = 3", r"heads"),
    ],
)
def test_refuses(tiny, line, message):
    tiny.write_text(TINY + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        config.load(str(tiny))
    assert "\n" not in str(caught.value)


def test_a_single_binding_that_a_longer_scope_hides_everywhere_is_refused():
    config.load("quickstart", bindings=["matrices/schedules.WSD.lr = 0.02"])
    with pytest.raises(UserError, match=r"`schedules.WSD.lr = 0.02`; .* name the scope of"):
        config.load("quickstart", bindings=["schedules.WSD.lr = 0.02"])


def test_a_required_knob_that_is_missing_is_named(tmp_path):
    path = tmp_path / "bare.gin"
    text = pathlib.Path(__file__).parents[1].joinpath("experiments/quickstart.gin").read_text()
    path.write_text(re.sub(r"(?m)^mlp.GatedMLP.width.*$", "", text))
    with pytest.raises(UserError, match=r"GatedMLP needs width; bind `GatedMLP.width = ...`"):
        config.load(str(path))


def test_a_file_without_an_experiment(tmp_path):
    path = tmp_path / "none.gin"
    path.write_text("from __gin__ import dynamic_registration\nfrom layers import norm\nnorm.RMSNorm.eps = 1e-5\n")
    with pytest.raises(UserError, match="it is no experiment"):
        config.load(str(path))
    path.write_text("norm.RMSNorm.eps = 1e-5\n")
    with pytest.raises(UserError, match="dynamic_registration"):
        config.load(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "quickstrat"}, "unknown experiment 'quickstrat': did you mean 'quickstart'"),
        ({"name": "quickstart", "overlays": ["mesh/fdsp"]}, "unknown overlay 'mesh/fdsp': did you mean 'mesh/fsdp'"),
        ({"name": "quickstart", "job": "trian"}, "unknown job 'trian': did you mean 'train'"),
        ({"name": "nowhere/file.gin"}, "there is no experiment file nowhere/file.gin"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(UserError, match=message):
        config.load(**arguments)
