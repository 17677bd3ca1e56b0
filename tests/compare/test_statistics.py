import math

import numpy as np
import pytest
from scipy import stats

from maxlike.compare import statistics
from maxlike.compare.metrics import Value
from maxlike.compare.rules import Above, Lower, Ratio
from maxlike.compare.statistics import decide, interval, seeds_needed, together


def outcome(values, boundary=0.0, side="below"):
    return decide(values, values, boundary, side).outcome


def test_the_interval_is_students():
    x = [0.3, -0.1, 0.25, 0.4]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(x), scale=stats.sem(x))
    found = interval(x)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    p = stats.ttest_1samp(x, found.low).pvalue
    assert p == pytest.approx(0.05, rel=1e-9)


def trials(seed, effect, count=100, seeds=3):
    """Paired runs of two arms: what a seed does to both, and the noise of each."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        common = 3 + rng.normal(0, 0.2, seeds)
        arms = {"a": common - effect + rng.normal(0, 0.02, seeds), "b": common + rng.normal(0, 0.02, seeds)}
        yield lambda metric, arm, arms=arms: {s: Value.of(x) for s, x in enumerate(arms[arm])}


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_same_arm_twice_does_not_win(seeds):
    one = (Lower(metric="train/loss", arm="a", than="b"),)
    both = (*one, Ratio(metric="train/loss", arm="a", than="b", below=1.0))
    relative = (Lower(metric="train/loss", arm="a", than="b", relative=True),)
    for rule in (one, both, relative):
        found = [together([c.judge(values).outcome for c in rule]) for values in trials(0, 0.0, seeds=seeds)]
        assert found.count("holds") <= 5
        assert found.count("does not hold") <= 5
        assert found.count("cannot tell") >= 90


def test_false_wins_in_the_long_run_are_a_half_of_five_percent():
    rule = Lower(metric="train/loss", arm="a", than="b")
    wins = sum(rule.judge(values).outcome == "holds" for values in trials(1, 0.0, count=4000))
    assert wins / 4000 == pytest.approx(0.025, abs=0.0075)  # three standard deviations


def test_a_real_effect_is_found_and_its_opposite_refuted():
    rule, reverse = (Lower(metric="train/loss", arm=a, than=b) for a, b in (("a", "b"), ("b", "a")))
    found = [(rule.judge(values).outcome, reverse.judge(values).outcome) for values in trials(2, 0.15)]
    assert sum(pair == ("holds", "does not hold") for pair in found) >= 85
    assert ("does not hold", "holds") not in found


def test_pairing_takes_out_what_a_seed_does_to_both():
    """Unpaired, a spread of 0.2 between seeds would hide a difference of 0.15."""
    wins = 0
    for values in trials(3, 0.15):
        a, b = ([v.low for v in values("", arm).values()] for arm in "ab")
        wins += stats.ttest_ind(a, b).pvalue < 0.05
    assert wins < 20


@pytest.mark.parametrize("value", [0.0, 0.37, 1e-9])
def test_arms_that_do_not_differ_at_all(value):
    """Bit-identical runs: no spread, no difference. Neither side of the claim may win."""
    assert outcome([value] * 3, boundary=value) == "cannot tell"
    assert decide([value] * 3, [value] * 3, value, "below").seeds_needed is None
    assert outcome([value] * 3, boundary=value + 0.01) == "holds"  # 'not worse than by 0.01'
    assert outcome([value] * 3, boundary=value - 0.01) == "does not hold"


def test_one_seed_tells_nothing():
    one = decide([-100.0], [-100.0], 0.0, "below")
    assert one.outcome == "cannot tell" and one.seeds_needed is None and math.isinf(one.interval.high)
    assert outcome([]) == "cannot tell"


def test_both_sides():
    assert outcome([-1.0, -1.1, -0.9]) == "holds"
    assert outcome([-1.0, -1.1, -0.9], side="above") == "does not hold"
    assert outcome([1.0, -1.1, 0.2]) == "cannot tell"


def test_infinite_differences():
    inf = math.inf
    assert outcome([inf] * 3) == "does not hold" and outcome([-inf] * 3) == "holds"
    assert outcome([inf] * 2) == outcome([inf, inf, 0.1]) == outcome([inf, -inf, inf]) == "cannot tell"
    assert outcome([math.nan, -1.0, -1.0]) == "cannot tell"


def test_runs_that_diverge_by_chance_do_not_win_often():
    """Both arms diverge in half of the runs, the worst that chance can do."""
    rng, wins = np.random.default_rng(4), 0
    for _ in range(2000):
        a, b = (np.where(rng.random(3) < 0.5, math.inf, rng.normal(0, 1, 3)) for _ in "ab")
        values = {"a": a, "b": b}
        judged = Lower(metric="train/loss", arm="a", than="b").judge(
            lambda _, arm, values=values: {s: Value.of(x) for s, x in enumerate(values[arm])}
        )
        wins += judged.outcome == "holds"
    assert wins / 2000 < 0.025


def test_a_bound_decides_only_what_all_it_may_be_decides():
    """A speed-up that was not reached lies between 0 and a bound."""
    assert decide([0.0] * 3, [0.9] * 3, 1.0, "above").outcome == "does not hold"
    assert decide([0.0] * 3, [1.2] * 3, 1.0, "above").outcome == "cannot tell"
    assert decide([0.0, 1.3, 1.3], [0.9, 1.3, 1.3], 1.0, "above").outcome == "cannot tell"


@pytest.mark.parametrize(("sd", "distance"), [(1.0, 1.0), (0.5, 0.1), (0.02, 0.002), (1.0, 3.0)])
def test_seeds_needed_is_the_smallest(sd, distance):
    n = seeds_needed(sd, distance)
    assert statistics.half_width(sd, n) < distance
    assert n == 2 or statistics.half_width(sd, n - 1) >= distance


def test_seeds_needed_where_none_would_do():
    assert seeds_needed(1.0, 0.01) is None  # 38,000
    assert seeds_needed(1.0, 0.0) is None
    assert seeds_needed(math.nan, 1.0) is None
    assert seeds_needed(0.0, 1e-3) == 2


def test_a_conjunction():
    h, d, c = "holds", "does not hold", "cannot tell"
    assert together([h, h]) == h and together([h, c]) == c and together([c, d, h]) == d and together([]) == c


def test_above_takes_a_diverged_run_for_the_worst():
    values = {s: Value.of(math.inf) for s in range(3)}
    assert Above(metric="measured/x", arm="a", value=1.0).judge(lambda *_: values).outcome == "does not hold"
