"""The mixture is exact: brute force, closed forms, Grain's own interleave, the paper's numbers."""

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlike.data.mixture import Interleave, Mixture, leave_one_out, linear, two_phase, whole_weights
from maxlike.errors import UserError

NAMES = ("a", "b", "c", "d")
PAPER = (dict(zip(NAMES, (3435, 3670, 717, 2178))), dict(zip(NAMES, (0, 30, 35, 35))))


@st.composite
def interleaves(draw):
    sources = draw(st.integers(1, 5))
    weights = st.lists(st.integers(0, 50), min_size=sources, max_size=sources).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 400), max_size=3)))
    phases = [tuple(draw(weights)) for _ in range(len(starts) + 1)]
    return Interleave(tuple(map(str, range(sources))), (0, *starts), tuple(phases))


@settings(max_examples=25)
@given(interleaves())
def test_keys_run_without_gaps_and_counts_is_the_histogram_of_every_prefix(interleave):
    sources, keys = interleave.locate(np.arange(600))
    given_so_far = np.zeros(len(interleave.names), np.int64)
    for example, (source, key) in enumerate(zip(sources, keys)):
        np.testing.assert_array_equal(interleave.counts(example), given_so_far)
        assert key == given_so_far[source]
        assert interleave.weights[interleave.phase(example)][source] > 0
        given_so_far[source] += 1
    worst = max(len(interleave.names) - 1, 0) * len(interleave.starts)
    assert np.abs(interleave.counts(600) - interleave.expected(600)).max() <= worst + 1e-9


@given(interleaves(), st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_the_map_is_pure_and_agrees_with_counts_far_out(interleave, examples):
    sources, keys = interleave.locate(np.array(examples))
    for example, source, key in zip(examples, sources, keys):
        assert interleave.counts(example)[source] == key
        assert interleave.counts(example + 1)[source] == key + 1
        assert interleave.locate(np.array([example]))[0][0] == source


def test_the_numbers_of_the_paper_twin():
    mixture = Mixture(phases=two_phase(base=PAPER[0], final=PAPER[1], total_steps=1000, fraction=0.2))
    interleave = mixture.interleave(NAMES, batch_size=10)
    assert interleave.counts(8_000).tolist() == [2748, 2936, 574, 1742]
    assert (interleave.counts(10_000) - interleave.counts(8_000)).tolist() == [0, 600, 700, 700]


def test_same_sequence_as_grain():
    parents = [grain.MapDataset.range(source * 10**6, (source + 1) * 10**6) for source in range(3)]
    mixed = grain.MapDataset.mix(parents, weights=[100, 250, 400])
    interleave = Mixture(phases=((0, {"a": 100, "b": 250, "c": 400}),)).interleave("abc", 1)
    sources, keys = interleave.locate(np.arange(3000))
    assert [mixed[i] for i in range(3000)] == (sources * 10**6 + keys).tolist()


def test_branching_keeps_history_and_examples():
    trunk = Mixture(phases=((0, PAPER[0]),)).interleave(NAMES, 8)
    branch = Mixture(phases=((0, PAPER[0]), (50, PAPER[1]))).interleave((*NAMES, "new"), 8)
    assert trunk.history(400) == branch.history(400) != branch.history(401)
    np.testing.assert_array_equal(trunk.locate(np.arange(400)), branch.locate(np.arange(400)))
    source, key = branch.locate(np.arange(400, 440))
    first = {int(s): int(key[source == s][0]) for s in np.unique(source)}
    assert first == {s: trunk.counts(400)[s] for s in (1, 2, 3)}  # epochs continue: no key is given twice
    other = Mixture(phases=((0, PAPER[0] | {"a": 3436}), (50, PAPER[1]))).interleave(NAMES, 8)
    assert other.history(400) != branch.history(400)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 5), min_size=1), st.sampled_from([1000, 10_000]))
def test_largest_remainder_sums_exactly_and_is_off_by_less_than_one(weights, resolution):
    whole = whole_weights(weights, resolution)
    assert sum(whole.values()) == resolution
    total = sum(weights.values())
    assert all(abs(whole[name] - weight * resolution / total) < 1 for name, weight in weights.items())


def test_linear_goes_from_one_mix_to_the_other():
    phases = linear(start=100, end=200, weights_a={"a": 1, "b": 3}, weights_b={"a": 1}, pieces=4)
    assert [start for start, _ in phases] == [0, 125, 150, 175, 200]
    shares = [weights["a"] / sum(weights.values()) for _, weights in phases]
    np.testing.assert_allclose(shares, [0.25, 0.4375, 0.625, 0.8125, 1.0])
    Mixture(phases=phases)  # the last weight of b is exactly 0


def test_leave_one_out_keeps_the_share_of_its_class():
    weights = {"web": 50.0, "math": 20.0, "code": 30.0}
    within = leave_one_out(weights=weights, source="math", among=("math", "code"))
    assert within == pytest.approx({"web": 50.0, "math": 0, "code": 50.0})
    over_all = leave_one_out(weights=weights, source="math")
    np.testing.assert_allclose(list(over_all.values()), [62.5, 0, 37.5])


def test_epochs_above_the_cap_are_tabled_and_refused_or_warned():
    mixture = Mixture(phases=((0, {"a": 1, "b": 1}),), max_epochs={"a": 4.0})
    mixture.check_epochs({"a": 4.0, "b": 90.0})
    with pytest.raises(UserError, match=r"(?s)read a more often.*a: 4.50 epochs, at most 4.0\n  b: 90.00 epochs"):
        mixture.check_epochs({"a": 4.5, "b": 90.0})
    warned = Mixture(phases=((0, {"a": 1, "b": 1}),), max_epochs=4.0, on_exceed="warn")
    with pytest.warns(UserWarning, match="a, b more often"):
        warned.check_epochs({"a": 4.5, "b": 90.0})


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "is empty"),
        (((1, {"a": 1}),), "the first must be 0"),
        (((0, {"a": 1}), (5, {"a": 1}), (5, {"a": 2})), "the others rise"),
        (((0, {"a": 1}), (2.5, {"a": 1})), "whole step"),
        (((0, {"a": -1}),), "must be a number that is not negative"),
        (((0, {"a": float("nan")}),), "must be a number that is not negative"),
        (((0, {"a": 0, "b": 0.0}),), "are zero"),
        (((0, {"a": 600_000, "b": 600_000}),), "sum to 1200000"),
        (((0, {"a": 1e-9, "b": 1.0}),), "rounds to none"),
    ],
)
def test_refused_phases(phases, message):
    with pytest.raises(UserError, match=message):
        Mixture(phases=phases)


def test_other_refusals():
    with pytest.raises(UserError, match="names 'c', but the sources are a, b"):
        Mixture(phases=((0, {"c": 1}),)).interleave("ab", 1)
    with pytest.raises(UserError, match="resolution=2000000 must lie"):
        Mixture(phases=((0, {"a": 1.0}),), resolution=2_000_000)
    with pytest.raises(UserError, match="must be 'refuse' or 'warn'"):
        Mixture(phases=((0, {"a": 1.0}),), on_exceed="ignore")
    with pytest.raises(UserError, match="max_epochs names 'z'"):
        Mixture(phases=((0, {"a": 1}),), max_epochs={"z": 1}).check_epochs({"a": 1.0})
    with pytest.raises(UserError, match=r"is 0\.7, not a whole number"):
        two_phase(base={"a": 1}, final={"b": 1}, total_steps=7, fraction=0.1)
    with pytest.raises(UserError, match="cannot hold pieces=20"):
        linear(start=0, end=10, weights_a={"a": 1}, weights_b={"b": 1})
    with pytest.raises(UserError, match="others must take its share"):
        leave_one_out(weights={"a": 1}, source="a")
