import json
import math

import numpy as np
import pytest

from maxlike.compare.metrics import DIVERGED, Metrics, Name, Run, Value, described, parse
from maxlike.errors import UserError
from tests.compare import synthetic


def run(root, arm, losses, *, seed=0, shift=0.0, diverged=None, kurtosis=None, flops_per_step=10.0):
    directory = root / arm / str(seed)
    synthetic.write(directory, losses, kurtosis=kurtosis)
    return Run(arm, seed, directory / "metrics.jsonl", len(losses), flops_per_step, shift, diverged)


def value(metrics, name, arm="a"):
    (found,) = metrics.values(name, arm).values()
    assert found.known
    return found.low


def test_values_by_name(tmp_path):
    losses = np.linspace(5, 3, 50)
    found = Metrics([run(tmp_path, "a", losses, kurtosis=7.5)], baseline="a")
    assert value(found, "train/loss") == pytest.approx(losses[-5:].mean())
    assert value(found, "train/loss/area") == pytest.approx(4.0)
    assert value(found, "train/loss/image") == pytest.approx(2 * losses[-5:].mean() + 1)
    assert value(found, "train/loss/image/area") == pytest.approx(9.0)
    assert value(found, "validation/loss") == pytest.approx(3.1)
    assert value(found, "measured/kurtosis") == 7.5
    assert value(found, "train/load/01") == 0.75
    assert value(found, "spikes/loss") == 0
    assert value(found, "eta/loss") == 1


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("train/loss", Name("train", "loss")),
        ("train/loss/image/area", Name("train", "loss/image", True)),
        ("measured/kurtosis/area", Name("measured", "kurtosis/area")),
        ("eta/loss/image", Name("eta", "loss/image")),
    ],
)
def test_names(metric, name):
    assert parse(metric) == name
    assert described(metric)


@pytest.mark.parametrize("metric", ["loss", "trian/loss", "train/", ""])
def test_a_name_of_no_kind_is_refused(metric):
    with pytest.raises(UserError, match="begins with train/"):
        parse(metric)


def test_spikes(tmp_path):
    losses = np.full(60, 2.0)
    losses[[30, 45]] = 2.6, math.nan
    losses[50] = 2.49
    assert value(Metrics([run(tmp_path, "a", losses)], baseline="a"), "spikes/loss") == 2


def test_a_dropped_step_is_left_out_of_a_mean_and_most_of_them_are_not(tmp_path):
    losses = np.full(50, 2.0)
    losses[-2] = math.nan
    assert value(Metrics([run(tmp_path, "a", losses)], baseline="a"), "train/loss") == 2
    losses[-3:] = math.nan
    found = Metrics([run(tmp_path, "b", losses)], baseline="b")
    assert found.values("train/loss", "b") == {0: DIVERGED}


def test_a_diverged_run_is_infinitely_bad_and_never_reaches(tmp_path):
    runs = [run(tmp_path, "a", np.linspace(5, 3, 50)), run(tmp_path, "b", np.linspace(5, 1, 20), diverged="bad steps")]
    found = Metrics(runs, baseline="a")
    for metric in ("train/loss", "validation/loss", "measured/kurtosis", "spikes/loss", "train/loss/area"):
        assert found.values(metric, "b") == {0: DIVERGED}
    eta = found.values("eta/loss", "b")[0]
    assert eta.low == 0 and math.isfinite(eta.high)


def test_eta_of_a_curve_that_is_the_same_in_half_the_time(tmp_path):
    x = np.arange(1, 401)
    slow, fast = (3 + 2 * np.exp(-x / tau) for tau in (200, 100))
    found = Metrics([run(tmp_path, "a", slow), run(tmp_path, "b", fast)], baseline="a")
    assert value(found, "eta/loss", "b") == pytest.approx(2.0, rel=0.03)  # smoothed over 20 steps
    assert value(found, "eta/loss/image", "b") == pytest.approx(2.0, rel=0.03)
    dearer = Metrics([run(tmp_path, "a", slow), run(tmp_path, "c", fast, flops_per_step=20.0)], baseline="a")
    assert value(dearer, "eta/loss", "c") == pytest.approx(1.0, rel=0.03)


def test_the_flops_of_ancestors_count(tmp_path):
    """An arm that goes on from 200 steps of another one starts at their FLOPs."""
    x = np.arange(1, 401)
    slow, fast = (3 + 2 * np.exp(-x / tau) for tau in (200, 100))
    later = run(tmp_path, "b", fast, shift=2000.0)
    found = Metrics([run(tmp_path, "a", slow), later], baseline="a")
    assert value(found, "eta/loss", "b") == pytest.approx(1.0, rel=0.03)
    assert later.curve("loss", 1)[0][[0, -1]].tolist() == [2010, 6000]


def test_eta_that_was_not_reached_is_known_by_a_bound(tmp_path):
    runs = [run(tmp_path, "a", np.linspace(5, 3, 50)), run(tmp_path, "b", np.linspace(5, 3.2, 100))]
    eta = Metrics(runs, baseline="a").values("eta/loss", "b")[0]
    assert eta.low == 0 and eta.high < 0.5 and eta.high == pytest.approx(0.5)


def test_a_dip_is_no_arrival(tmp_path):
    dip = np.linspace(5, 2.9, 100)
    dip[40:50] = 2.5
    runs = [run(tmp_path, "a", np.linspace(5, 3, 100)), run(tmp_path, "b", dip)]
    assert 1 < value(Metrics(runs, baseline="a"), "eta/loss", "b") < 1.2


def test_identical_arms_have_an_eta_of_exactly_one_however_they_end(tmp_path):
    losses = synthetic.curve(np.random.default_rng(0), 0.0)
    losses[-5:] += 0.4
    runs = [run(tmp_path, "a", losses), run(tmp_path, "b", losses)]
    assert Metrics(runs, baseline="a").values("eta/loss", "b") == {0: Value.of(1.0)}


def test_a_baseline_that_diverged_leaves_eta_open(tmp_path):
    runs = [run(tmp_path, "a", np.linspace(5, 3, 50), diverged="bad"), run(tmp_path, "b", np.linspace(5, 3, 50))]
    assert Metrics(runs, baseline="a").values("eta/loss", "b") == {0: Value(0.0, math.inf)}


def test_a_metric_that_nobody_writes_is_refused_with_the_nearest(tmp_path):
    found = Metrics([run(tmp_path, "a", [3, 2], kurtosis=1.0), run(tmp_path, "b", [3, 2])], baseline="a")
    with pytest.raises(UserError, match="'train/loss/imag', which no arm writes: did you mean 'train/loss/image'"):
        found.refuse_unwritten("train/loss/imag")
    with pytest.raises(UserError, match=r"which the arm b \(seed 0\) does not write"):
        found.refuse_unwritten("measured/kurtosis", ["a", "b"], "the rule 'x'")
    with pytest.raises(UserError, match="there are measured/kurtosis"):
        found.refuse_unwritten("measured/zzzzzzzzzzzzzzzzzzzzzzzzz")
    found.refuse_unwritten("measured/kurtosis")
    found.refuse_unwritten("eta/loss", ["b"])


def test_a_run_that_diverged_need_not_have_written(tmp_path):
    found = Metrics([run(tmp_path, "a", [3, 2], diverged="bad")], baseline="a")
    found.refuse_unwritten("measured/kurtosis", ["a"])


def test_lines_of_a_resumed_run_are_read_in_order(tmp_path):
    lines = [{"step": s, "split": "train", "loss": float(s)} for s in (3, 1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl')
    steps, values = Run("a", 0, path, 3, 1.0).column("train", "loss")
    assert steps.tolist() == values.tolist() == [1, 2, 3]
