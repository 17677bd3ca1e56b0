import pytest

from maxlike.compare import pairing
from maxlike.compare.comparison import Comparison
from maxlike.compare.library import Library
from maxlike.errors import UserError
from tests.compare import toy

LIBRARY = Library()


def comparison(**knobs) -> Comparison:
    words = dict.fromkeys(("title", "source", "claim", "falsified_by"), "words")
    return Comparison(**words | {"arms": ("x/a", "x/b"), "baseline": "a"} | knobs)


def loaded(folder, *bindings: str):
    return {"a": LIBRARY.load(toy.arm(folder, "a")), "b": LIBRARY.load(toy.arm(folder, "b"), (), bindings)}


@pytest.mark.parametrize(
    ("binding", "field"),
    [
        ("steps = 5", "Experiment.steps is 5 and 4"),
        ("experiment.Experiment.batch_size = 16", "Experiment.batch_size is 16 and 8"),
        ("experiment.Experiment.sequence_length = 16", "Experiment.sequence_length is 16 and 32"),
        ("experiment.Experiment.seed = 3", "Experiment.seed is 3 and 0"),
        ("data.Data.tokenizer = @tokenizers.Bytes()", "tokenizers differ"),
        ("data.Data.packing = 'best_fit'", "data differ in the source austen: its documents, or how Data.packing"),
        ("train/sources.Text.start_byte = 1000", "data differ in the source austen"),
        ("held_out/sources.Text.start_byte = -7000", "held-out data"),
    ],
)
def test_what_cannot_be_paired_is_named(tmp_path, binding, field):
    with pytest.raises(UserError, match="the arms b and a cannot be paired") as refusal:
        pairing.check(comparison(), loaded(tmp_path, binding))
    assert field in str(refusal.value)


def test_arms_that_differ_in_the_network_are_paired(tmp_path):
    pairing.check(comparison(), loaded(tmp_path, "mlp.GatedMLP.width = 24"))


def test_an_unmatched_arm_may_have_steps_and_data_of_its_own_but_not_a_tokenizer(tmp_path):
    free = comparison(unmatched=("b",))
    pairing.check(free, loaded(tmp_path, "steps = 5", "experiment.Experiment.seed = 3"))
    with pytest.raises(UserError, match="tokenizers differ"):
        pairing.check(free, loaded(tmp_path, "data.Data.tokenizer = @tokenizers.Bytes()"))
    with pytest.raises(UserError, match=r"or name b in Comparison\.unmatched"):
        pairing.check(comparison(after={"b": "a"}), loaded(tmp_path, "steps = 5"))
