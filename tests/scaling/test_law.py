"""Laws that are known come back from their points, and intervals cover what they promise."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import special

from maxlike.errors import UserError
from maxlike.scaling import forms, law_plot
from maxlike.scaling.fit import fit
from maxlike.scaling.huber import Huber, finish, minimize_many
from maxlike.scaling.law import Law
from maxlike.scaling.optimum import optimum

X = np.geomspace(1, 64, 8)
N, D = (axis.ravel() for axis in np.meshgrid([6e7, 1.2e8, 2.4e8, 5e8], [2e9, 4e9, 8e9, 1.6e10]))
CHINCHILLA = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # arXiv 2203.15556, appendix D.3


def chinchilla(size, tokens):
    c = CHINCHILLA
    return c["E"] + c["A"] / size ** c["alpha"] + c["B"] / tokens ** c["beta"]


def noise(size: float, count: int, seed: int = 0) -> np.ndarray:
    return np.exp(size * np.random.default_rng(seed).normal(size=count))


def test_step_law_comes_back_from_its_points_with_its_published_values():
    """arXiv 2503.04715: lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens."""
    rate = fit(forms.power_law(("N", "D")), {"N": N, "D": D}, 1.79 * N**-0.713 * D**0.307)
    batch = fit(forms.power_law(("D",)), {"D": D}, 0.58 * D**0.571)
    found = {name: interval.value for name, interval in rate.parameters.items()}
    assert found == pytest.approx({"a": 1.79, "b_N": -0.713, "b_D": 0.307}, rel=1e-6)
    assert {name: i.value for name, i in batch.parameters.items()} == pytest.approx({"a": 0.58, "b": 0.571}, rel=1e-6)
    assert rate.predict({"N": 1.074e9, "D": 5.69e10}).value == pytest.approx(1.3049e-3, rel=1e-4)
    assert batch.predict({"D": 5.69e10}).value == pytest.approx(802_781, rel=1e-5)
    far = rate.predict({"N": 7e9, "D": 1.4e12})
    assert far.value == pytest.approx(9.1656e-4, rel=1e-4)
    assert (far.variable, far.extrapolated_by) == ("D", pytest.approx(87.5))
    assert "EXTRAPOLATED: D is 87.5 times outside" in str(far)
    assert "inside the fitted range" in str(rate.predict({"N": 1e8, "D": 3e9}))
    assert rate.predict({"N": 6e6, "D": 3e9}).extrapolated_by == pytest.approx(10)


def test_the_chinchilla_form_comes_back_exactly_and_from_noise_within_its_intervals():
    exact = fit(forms.chinchilla(), {"N": N, "D": D}, chinchilla(N, D), replicates=20)
    assert {name: i.value for name, i in exact.parameters.items()} == pytest.approx(CHINCHILLA, rel=1e-4)
    noisy = fit(forms.chinchilla(), {"N": N, "D": D}, chinchilla(N, D) * noise(0.002, len(N)), replicates=100)
    assert all(noisy.parameters[name].low <= value <= noisy.parameters[name].high for name, value in CHINCHILLA.items())
    far = noisy.predict({"N": 1e9, "D": 1e11})
    assert far.low <= chinchilla(1e9, 1e11) <= far.high < 1.1 * far.low
    assert noisy.r2 > 0.999 and max(noisy.held_out) < 0.01
    with pytest.raises(UserError, match="takes two variables"):
        forms.of_name("chinchilla", ("N",))


def test_the_form_with_a_floor_finds_the_floor():
    law = fit(forms.power_law(floor=True), {"x": X}, (3 * X**-0.4 + 1.5) * noise(1e-4, len(X)), replicates=50)
    found = {name: interval.value for name, interval in law.parameters.items()}
    assert found == pytest.approx({"a": 3, "b": -0.4, "c": 1.5}, rel=0.01)
    rising = fit(forms.power_law(floor=True), {"x": X}, 0.2 * X**0.7 + 1.5, replicates=20)
    assert rising.parameters["b"].value == pytest.approx(0.7, rel=1e-4)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Nominal 95 %; of 80 repeats of two parameters and an extrapolation fewer than 68 would be a chance of 1e-4."""
    covered = np.zeros(3)
    for seed in range(80):
        y = 3 * X[:6] ** -0.3 * noise(0.01, 6, seed)
        law = fit(forms.power_law(), {"x": X[:6]}, y, huber=math.inf, replicates=100, seed=seed)
        far = law.predict({"x": 1000})
        a, b = law.parameters["a"], law.parameters["b"]
        truth = 3 * 1000**-0.3
        covered += [a.low <= 3 <= a.high, b.low <= -0.3 <= b.high, far.low <= truth <= far.high]
    assert covered.min() >= 68
    assert covered.max() < 80 or covered.sum() < 238  # an interval that always covers says nothing


def test_least_squares_is_the_textbooks_and_huber_is_scipys():
    y = 3 * X**-0.3 * noise(0.1, len(X))
    law = fit(forms.power_law(), {"x": X}, y, huber=math.inf, replicates=20)
    design = np.stack([np.ones_like(X), np.log(X)], 1)
    np.testing.assert_allclose(law.theta, np.linalg.lstsq(design, np.log(y), rcond=None)[0], atol=1e-9)
    delta, theta = 0.05, np.array([1.0, -0.2])
    loss, v = Huber(forms.power_law(), np.log(X)[:, None], delta), np.log(y)
    residuals = theta[0] + theta[1] * np.log(X) - np.log(y)
    assert loss.values(theta, np.ones(len(X)), v) == pytest.approx(special.huber(delta, residuals).sum() / delta**2)
    step = 1e-6
    slopes = [(loss.value_and_gradient(theta + e, v)[0] - loss.value_and_gradient(theta - e, v)[0]) / (2 * step)
              for e in step * np.eye(2)]  # fmt: skip
    np.testing.assert_allclose(loss.value_and_gradient(theta, v)[1], slopes, rtol=1e-5)


def test_many_samples_together_end_where_lbfgs_does():
    rng = np.random.default_rng(3)
    log_x = np.log(np.stack([N, D], 1))
    u = log_x - log_x.mean(0)
    v = np.log(chinchilla(N, D) * noise(0.003, len(N)))
    loss = Huber(forms.chinchilla(), u, 1e-3)
    start = np.array([-0.5, -1.0, -0.3, -1.0, -0.3])
    weights = np.stack([np.ones(len(v)), rng.integers(0, 3, len(v)).astype(float)])
    targets = np.stack([v - v.mean(), v - v.mean() + 0.01 * rng.normal(size=len(v))])
    together = minimize_many(loss, np.stack([start, start]), weights, targets, iterations=3000)
    by_lbfgs = finish(loss, start, targets[0])
    best = (loss.values(theta, weights[0], targets[0]) for theta in (together[0], by_lbfgs))
    assert next(best) <= next(best) * (1 + 1e-6)
    alone = minimize_many(loss, start[None], weights[1:], targets[1:], iterations=3000)
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-6)


def test_a_run_that_went_wrong_does_not_bend_the_law():
    y = 3 * X**-0.3 * noise(1e-3, len(X))
    y[3] *= 1.5
    robust = fit(forms.power_law(), {"x": X}, y, replicates=20).parameters["b"].value
    squares = fit(forms.power_law(), {"x": X}, y, replicates=20, huber=math.inf).parameters["b"].value
    assert abs(robust + 0.3) < 2e-3 < abs(squares + 0.3)


def test_resampling_seeds_leaves_out_how_far_the_points_are_off_the_form():
    x, off = np.repeat(X, 3), np.repeat(noise(0.05, len(X)), 3)
    y = 3 * x**-0.3 * off * noise(1e-3, len(x), 1)
    of_points = fit(forms.power_law(), {"x": x}, y, huber=math.inf, replicates=100)
    of_seeds = fit(forms.power_law(), {"x": x}, y, huber=math.inf, replicates=100, resample="seeds")
    np.testing.assert_array_equal(of_points.theta, of_seeds.theta)
    wide, narrow = (law.parameters["b"] for law in (of_points, of_seeds))
    assert 0 < narrow.high - narrow.low < 0.2 * (wide.high - wide.low)
    assert (of_seeds.points, of_seeds.runs) == (8, 24)


@pytest.mark.parametrize("resample", ["points", "seeds"])
def test_two_seeds_a_point_do_not_hide_how_far_they_are_apart(resample):
    """Counted as runs of their own they would leave a loss by size flat between them, and intervals of no width."""
    covered = 0
    for seed in range(20):
        y = 3 * np.repeat(X, 2) ** -0.3 * noise(0.02, 16, seed)
        b = fit(forms.power_law(), {"x": np.repeat(X, 2)}, y, replicates=60, resample=resample).parameters["b"]
        assert b.high - b.low > 0.003
        covered += b.low <= -0.3 <= b.high
    assert covered >= 15


def test_a_law_is_the_same_from_its_record_and_from_the_same_seed():
    fitted = fit(forms.power_law(floor=True), {"x": X}, 3 * X**-0.3 + 1, replicates=20, seed=5)
    record = json.loads(json.dumps(fitted.record(), allow_nan=False))
    again = Law.of_record(record)
    assert again.predict({"x": 500}) == fitted.predict({"x": 500})
    assert again.sentences() == fitted.sentences()
    repeated = fit(forms.power_law(floor=True), {"x": X}, 3 * X**-0.3 + 1, replicates=20, seed=5)
    np.testing.assert_array_equal(repeated.replicates, fitted.replicates)
    with pytest.raises(UserError, match="no record of a law"):
        Law.of_record({name: value for name, value in record.items() if name != "theta"})
    assert dataclasses.replace(fitted, held_out=None).sentences()[-1] == "too few points to hold one out"
    points = {"x": X.tolist(), "y": (3 * X**-0.3 + 1).tolist()}
    assert law_plot.draw(fitted, points, "y", [{"x": 500.0}])[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("form", "x", "y", "knobs", "message"),
    [
        (forms.power_law(floor=True), {"x": [1, 2, 3]}, [3, 2, 1], {}, "3 parameters and there are 3 points"),
        (forms.power_law(), {"x": [1, 1, 2, 2]}, [1, 2, 3, 4], {}, "2 parameters and there are 2 points"),
        (forms.power_law(("N", "D")), {"N": [1, 2, 1, 2], "D": [1, 2, 3, 4]}, [1] * 4, {}, "N has 2 values"),
        (forms.power_law(("N", "D")), {"N": [1, 2, 3, 4], "D": [2, 4, 6, 8]}, [1] * 4, {}, "N and D move together"),
        (forms.power_law(), {"x": [1, 2, 3, 4]}, [1, 2, -3, 4], {}, "y is -3.0 in run 2"),
        (forms.power_law(), {"x": [1, 2, 3, 4]}, [1, 2, math.nan, 4], {}, "y is nan in run 2"),
        (forms.power_law(), {"x": [1, 2, 3]}, [1, 2, 3, 4], {}, "3 values of x and 4 of y"),
        (
            forms.power_law(),
            {"x": [1, 2, 3, 4]},
            [1, 2, 3, 4],
            {"resample": "seeds"},
            "two runs or more",
        ),
        (forms.power_law(), {"x": [1, 2, 3, 4]}, [1, 2, 3, 4], {"huber": 0.0}, "huber=0.0 must be positive"),
        (forms.power_law(("D",)), {"x": [1, 2, 3, 4]}, [1, 2, 3, 4], {}, "needs values of D"),
    ],
)
def test_fits_that_are_refused(form, x, y, knobs, message):
    with pytest.raises(UserError, match=message):
        fit(form, x, y, **knobs)


def test_predictions_that_are_refused():
    law = fit(forms.power_law(), {"x": X}, 3 * X**-0.3, replicates=20)
    refused = (({}, "needs a positive x"), ({"x": -1.0}, "positive x"), ({"x": 1.0, "z": 1.0}, "variable 'z'"))
    for point, message in refused:
        with pytest.raises(UserError, match=message):
            law.predict(point)


def test_the_optimum_of_a_bowl_is_found_between_the_grids_points():
    rates, batches = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e-3, 1.6e-2, 5), np.geomspace(8, 128, 5)))
    u, v = np.log(rates / 5e-3), np.log(batches / 30)
    loss = 3 * (1 + 0.004 * (u**2 + 0.7 * v**2 - 0.5 * u * v))
    assert optimum({"lr": rates, "batch": batches}, loss, within=0.05) == pytest.approx({"lr": 5e-3, "batch": 30})
    one = np.isclose(batches, 32)
    assert optimum({"lr": rates[one]}, 3 * (1 + 0.01 * u[one] ** 2), within=0.1)["lr"] == pytest.approx(5e-3)
    for y, message in (
        (3 + 0.1 * u[one], "bowl|outside"),
        (3 * (1 + 0.001 * (u[one] - 5) ** 2), "outside of the values tried"),
        (3 + np.arange(5.0), "needs 3 points"),
    ):
        with pytest.raises(UserError, match=message):
            optimum({"lr": rates[one]}, y, within=0.1)
    two = np.isin(rates, np.unique(rates)[1:3])  # two values of a knob are a line, and every bowl goes through them
    with pytest.raises(UserError, match="three values of each"):
        optimum({"lr": rates[two], "batch": batches[two]}, loss[two], within=1)
    with pytest.raises(UserError, match="decay has the value 0"):
        optimum({"decay": [0.0, 0.1, 0.2, 0.3]}, [3.1, 3.0, 3.0, 3.1])


def test_an_interval_without_an_end_is_written_as_none():
    """Against FLOPs of large runs a prefactor is an extrapolation by twenty powers of ten, and may be anything."""
    flops = np.geomspace(1e19, 1e21, 6)
    y = (1 + 0.05 * (flops / 1e20) ** -0.3) * noise(0.02, 6)
    law = fit(forms.power_law(("flops",), floor=True), {"flops": flops}, y, replicates=100)
    assert law.parameters["a"].high == math.inf
    record = json.loads(json.dumps(law.record(), allow_nan=False))
    assert record["parameters"]["a"]["high"] is None
    assert Law.of_record(record).parameters["a"].high == math.inf
