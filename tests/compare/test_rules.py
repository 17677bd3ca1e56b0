import math

import pytest

from maxlike import config
from maxlike.compare.comparison import Comparison
from maxlike.compare.metrics import Value
from maxlike.compare.rules import Above, Below, GainsMore, Lower, Ratio, check_arms
from maxlike.errors import UserError


def judge(criterion, **arms):
    """Arms' values by seed; a pair is known by bounds."""
    table = {
        arm: {s: Value(*x) if isinstance(x, tuple) else Value.of(x) for s, x in enumerate(values)}
        for arm, values in arms.items()
    }
    return criterion.judge(lambda metric, arm: table[arm])


def lower(**knobs):
    return Lower(metric="train/loss", arm="a", than="b", **knobs)


def test_lower_by_an_amount():
    arms = {"a": [2.0, 2.11, 1.9], "b": [2.2, 2.3, 2.1]}
    assert judge(lower(), **arms).outcome == "holds"
    assert judge(lower(by=0.1), **arms).outcome == "holds"
    assert judge(lower(by=0.195), **arms).outcome == "cannot tell"
    assert judge(lower(by=0.3), **arms).outcome == "does not hold"
    found = judge(lower(), **arms)
    assert found.values == {
        0: pytest.approx((-0.2, -0.2)),
        1: pytest.approx((-0.19, -0.19)),
        2: pytest.approx((-0.2,) * 2),
    }


def test_not_worse_than_by_a_share():
    arms = {"a": [2.02, 4.04, 3.02], "b": [2.0, 4.0, 3.0]}
    assert judge(lower(by=-0.03, relative=True), **arms).outcome == "holds"
    assert judge(lower(by=-0.002, relative=True), **arms).outcome == "does not hold"
    assert judge(lower(by=-0.1), **arms).outcome == "holds"
    assert judge(lower(by=-0.1), **arms).decision.interval.mean == pytest.approx(0.08 / 3)


def test_a_share_of_nothing_cannot_be_told():
    assert judge(lower(relative=True), a=[1, 1, 1], b=[0, 0, 0]).outcome == "cannot tell"
    assert "positive" in judge(lower(relative=True), a=[1, 1, 1], b=[0, 0, 0]).note


def test_ratio_is_the_same_whatever_the_unit():
    ratio = Ratio(metric="measured/kurtosis", arm="a", than="b", below=1 / 3)
    small = judge(ratio, a=[1, 2, 1.5], b=[10, 18, 16])
    large = judge(ratio, a=[1000, 2000, 1500], b=[10_000, 18_000, 16_000])
    assert small.outcome == large.outcome == "holds" and small.log
    assert small.decision.interval.mean == pytest.approx(large.decision.interval.mean)
    assert math.exp(small.decision.interval.mean) == pytest.approx((0.1 * 2 / 18 * 1.5 / 16) ** (1 / 3))
    assert judge(ratio, a=[1, 2, 1.5], b=[1, 2.1, 1.4]).outcome == "does not hold"


def test_only_runs_of_one_seed_are_compared():
    table = {"a": {0: 1.0, 2: 1.1, 5: 0.9}, "b": {0: 2.0, 1: 9.0, 2: 2.1}}
    found = lower().judge(lambda metric, arm: {s: Value.of(x) for s, x in table[arm].items()})
    assert list(found.values) == [0, 2]


def test_above_and_below():
    above, below = (kind(metric="eta/loss", arm="a", value=1.0) for kind in (Above, Below))
    assert judge(above, a=[1.2, 1.3, 1.25]).outcome == "holds"
    assert judge(below, a=[1.2, 1.3, 1.25]).outcome == "does not hold"
    assert judge(above, a=[(0.0, 0.99)] * 3).outcome == "does not hold"
    assert judge(above, a=[(0.0, 0.99), 1.3, 1.3]).outcome == "cannot tell"
    assert judge(above, a=[math.inf] * 3).outcome == "does not hold"
    assert judge(below, a=[math.inf] * 3).outcome == "does not hold"


def test_a_diverged_arm():
    inf = math.inf
    worst = judge(lower(), a=[inf] * 3, b=[2.0, 2.1, 2.2])
    assert worst.outcome == "does not hold" and "every seed" in worst.note
    assert judge(lower(relative=True), a=[2.0, 2.1, 2.2], b=[inf] * 3).outcome == "holds"
    one = judge(lower(), a=[2.0, inf, 1.9], b=[2.2, 2.3, 2.1])
    assert one.outcome == "cannot tell" and "diverged" in one.note
    assert judge(lower(), a=[inf] * 3, b=[inf] * 3).outcome == "cannot tell"


def test_the_number_of_seeds_that_would_tell():
    found = judge(lower(), a=[1.9, 2.2, 2.05], b=[2.1, 2.1, 2.2]).decision
    assert found.outcome == "cannot tell" and 4 <= found.seeds_needed <= 1000
    assert "one seed" in judge(lower(), a=[1.0], b=[2.0]).note


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (lower(), "train/loss of a is lower than that of b"),
        (lower(by=0.02), "train/loss of a is lower than that of b by more than 0.02"),
        (lower(by=-0.03, relative=True), "train/loss of a is less than 3 % above that of b"),
        (Ratio(metric="measured/x", arm="a", than="b", below=0.6), "measured/x of a is less than 0.6 times that of b"),
        (Above(metric="eta/loss", arm="a", value=1), "eta/loss of a is above 1"),
        (Below(metric="measured/x", arm="a", value=0.5), "measured/x of a is below 0.5"),
    ],
)
def test_sentences(criterion, words):
    assert criterion.sentence() == words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Lower(metric="loss", arm="a", than="b"), "no metric"),
        (lambda: Lower(metric="train/loss", arm="a", than="a"), "name two arms"),
        (lambda: lower(by=math.nan), "finite"),
        (lambda: lower(by=1.0, relative=True), "below 1"),
        (lambda: Ratio(metric="train/loss", arm="a", than="b", below=0.0), "above 0"),
        (lambda: Above(metric="train/loss", arm="a", value=math.inf), "finite"),
        (lambda: check_arms([lower()], ["a", "bb"]), "did you mean 'bb'"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_criteria_are_bound_by_scopes(tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(
        """from __gin__ import dynamic_registration
from maxlike.compare import comparison
from maxlike.compare import rules

comparison.Comparison.title = 'Mine'
comparison.Comparison.source = 'me'
comparison.Comparison.claim = 'less is more'
comparison.Comparison.falsified_by = 'more'
comparison.Comparison.arms = ('families/transformer', 'families/moe')
comparison.Comparison.baseline = 'transformer'
comparison.Comparison.rule = (@total/rules.Lower(), @speed/rules.Above(), @size/rules.Ratio())
total/rules.Lower.metric = 'train/loss'
total/rules.Lower.arm = 'moe'
total/rules.Lower.than = 'transformer'
total/rules.Lower.by = -0.03
total/rules.Lower.relative = True
speed/rules.Above.metric = 'eta/loss'
speed/rules.Above.arm = 'moe'
speed/rules.Above.value = 1
size/rules.Ratio.metric = 'measured/kurtosis'
size/rules.Ratio.arm = 'moe'
size/rules.Ratio.than = 'transformer'
size/rules.Ratio.below = 0.5
"""
    )
    found = config.load(str(path), kind=Comparison).rule
    assert found == (
        Lower(metric="train/loss", arm="moe", than="transformer", by=-0.03, relative=True),
        Above(metric="eta/loss", arm="moe", value=1),
        Ratio(metric="measured/kurtosis", arm="moe", than="transformer", below=0.5),
    )
    path.write_text(path.read_text().replace("'train/loss'", "'loss'"))
    with pytest.raises(UserError, match="'loss' is no metric of a comparison"):
        config.load(str(path), kind=Comparison)


def test_a_gain_on_one_metric_is_compared_with_that_on_another():
    table = {
        ("train/loss/image", "a"): [2.0, 2.2, 2.1],
        ("train/loss/image", "b"): [2.3, 2.52, 2.39],
        ("train/loss/text", "a"): [1.5, 1.7, 1.6],
        ("train/loss/text", "b"): [1.6, 1.79, 1.71],
    }

    def values(metric, arm):
        return {seed: Value.of(x) for seed, x in enumerate(table[metric, arm])}

    more = GainsMore(metric="train/loss/image", other="train/loss/text", arm="a", than="b")
    assert more.judge(values).outcome == "holds"
    assert more.judge(values).values == {
        0: pytest.approx((-0.2,) * 2),
        1: pytest.approx((-0.23,) * 2),
        2: pytest.approx((-0.18,) * 2),
    }
    less = GainsMore(metric="train/loss/text", other="train/loss/image", arm="a", than="b")
    assert less.judge(values).outcome == "does not hold"
    assert (
        GainsMore(metric="train/loss/text", other="train/loss/image", arm="b", than="a").judge(values).outcome
        == "holds"
    )
    with pytest.raises(UserError, match="name two metrics"):
        GainsMore(metric="train/loss", other="train/loss", arm="a", than="b")


def test_a_metric_to_be_shown_of_no_known_kind_is_refused_before_the_runs():
    knobs = {"title": "", "source": "", "claim": "", "falsified_by": "", "arms": ("x/a", "x/b"), "baseline": "a"}
    with pytest.raises(UserError, match="'loss/train' is no metric"):
        Comparison(**knobs, metrics=("loss/train",))
