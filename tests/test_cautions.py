"""What is said at the start of a run that routes otherwise than its file reads."""

from maxlike import config
from maxlike.cautions import cautions


def said(*bindings, name="families/moma", overlays=()):
    experiment = config.load(name, overlays=overlays, bindings=["experiment.Experiment.batch_size = 8", *bindings])
    return cautions(experiment, experiment.mesh.open())


def test_routing_in_the_batch_is_cautioned_against_where_micro_batches_cut_it():
    assert said() == []
    (sentence,) = said("step.Step.micro_batches = 4")
    assert sentence.startswith("ModalityMoE.routing_scope='batch' compares the tokens of 2 rows, not of all 8")
    assert "cut by Step.micro_batches=4:" in sentence
    assert said("step.Step.micro_batches = 4", "modality_moe.ModalityMoE.routing_scope = 'sequence'") == []


def test_so_is_that_of_mixed_depth_and_of_stages():
    depth = "mixture_of_depths.MixtureOfDepths.scope = 'batch'"
    told = said("step.Step.micro_batches = 2", depth, name="papers/moma/mod_moma_4t4i")
    assert [sentence.split("=")[0] for sentence in told] == ["MixtureOfDepths.scope", "ModalityMoE.routing_scope"]
    (sentence,) = said("micro_batches = 2", overlays=("mesh/pipeline",))
    assert "the tokens of 4 rows" in sentence and "cut by Circular.micro_batches=2:" in sentence
