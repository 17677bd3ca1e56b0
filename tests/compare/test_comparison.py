import pytest

from maxlike import config
from maxlike.compare import compare, rules
from maxlike.compare.comparison import Comparison
from maxlike.compare.library import Library, parse_shard
from maxlike.errors import UserError
from maxlike.noun import Noun
from tests.compare import toy


def made(**knobs) -> Comparison:
    words = dict.fromkeys(("title", "source", "claim", "falsified_by"), "words")
    return Comparison(**words | {"arms": ("x/a", "x/b", "x/c"), "baseline": "a"} | knobs)


def test_arms_are_known_by_the_last_part_and_come_after_those_they_begin_from():
    comparison = made(after={"a": "b", "b": "c"}, unmatched=("b",))
    assert comparison.experiments == {"a": "x/a", "b": "x/b", "c": "x/c"}
    assert comparison.ancestors("a") == ("b", "c")
    assert list(comparison.ordered()) == ["c", "b", "a"]
    assert comparison.matched == ("a", "c")
    assert [(one.name, one.seed, one.after) for one in compare.plan(comparison, 2, ("b",))] == [
        ("c", 0, None),
        ("c", 1, None),
        ("b", 0, "c"),
        ("b", 1, "c"),
    ]


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"seeds": 0}, "Comparison.seeds=0"),
        ({"arms": ("x/a",)}, "at least two"),
        ({"arms": ("x/a", "y/a")}, "one short name"),
        ({"baseline": "aa"}, "Comparison.baseline names 'aa'"),
        ({"unmatched": ("z",)}, "Comparison.unmatched names 'z'"),
        ({"after": {"b": "z"}}, "Comparison.after names 'z'"),
        ({"after": {"b": "c", "c": "b"}}, "begins from itself"),
        ({"rule": (rules.Lower(metric="train/loss", arm="b", than="z"),)}, "names the arm 'z'"),
    ],
)
def test_what_cannot_be_is_refused(knobs, sentence):
    with pytest.raises(UserError, match=sentence):
        made(**knobs)


def test_a_file_about_a_comparison_has_its_own_job_and_is_no_experiment(tmp_path):
    name = toy.comparison(tmp_path, ("p/a", "p/b"))
    comparison = config.load(name, kind=Noun, default_job="train")
    assert isinstance(comparison, Comparison)
    assert comparison.config.job.func is compare.compare
    for refused in ({}, {"job": "train", "kind": Noun}):
        with pytest.raises(UserError, match="is a comparison: name one of its arms, p/a, p/b"):
            config.load(name, **refused)
    with pytest.raises(UserError, match=r"--job compare takes a file that binds comparison\.Comparison"):
        config.load("quickstart", job="compare", kind=Noun)


def test_bindings_go_to_the_comparison_or_to_the_arms_that_know_them(tmp_path):
    arms = toy.arm(tmp_path, "a"), toy.arm(tmp_path, "b", "width = 24", "mlp.GatedMLP.width = %width")
    name = toy.comparison(tmp_path, arms, "comparison.Comparison.match = @matching.ActiveFlops()")
    own, shared, of_b = "matching.ActiveFlops.tolerance = 0.5", "steps = 3", "width = 16"
    comparison = toy.load(name, own, shared, of_b, overlays=("cpu",))
    assert comparison.match.tolerance == 0.5
    assert comparison.bindings == (shared, of_b)
    assert comparison.own_bindings == (own,)
    assert comparison.overlays == ("cpu",)
    loaded = compare.load(comparison, Library())
    assert [one.experiment.steps for one in loaded.values()] == [3, 3]
    assert loaded["a"].experiment.config.unused.keys() == {f"--set {of_b!r}"}
    assert "mlp.GatedMLP.width = %width" in loaded["b"].experiment.config.operative
    for useless in ("nothing = 1", "nobody.Class.knob = 1", "attention.Attention.heds = 1"):
        with pytest.raises(UserError, match=f"--set '{useless}'"):
            compare.load(toy.load(name, useless), Library())


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(UserError, match="--shard"):
        parse_shard(shard)
    assert parse_shard("2/3") == (2, 3)
