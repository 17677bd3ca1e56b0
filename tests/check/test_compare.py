"""What departs is named, and what is rounding alone is not."""

import numpy as np
import pytest

from maxlike.check.compare import compare


def test_the_first_tensor_that_departs_is_named_in_order():
    good = {"gradients": {"a": np.ones(3), "b": np.full(3, 2.0), "c": np.ones(2)}}
    bad = {"gradients": {"a": np.ones(3), "b": np.array([2.0, 2.1, 2.0]), "c": np.zeros(2)}}
    result = compare(bad, good, 1e-5)
    assert result.first == "gradients: b (2.1 against 2)"
    assert result.largest == 1.0


def test_what_cancels_out_is_measured_by_its_section():
    good = {"gradients": {"key bias": np.array([1e-9]), "kernel": np.array([1.0])}}
    noise = {"gradients": {"key bias": np.array([-3e-9]), "kernel": np.array([1.0])}}
    lost = {"gradients": {"key bias": np.array([1e-9]), "kernel": np.array([1.0001])}}
    assert compare(noise, good, 1e-5).first is None
    assert compare(lost, good, 1e-5).first is not None


def test_what_a_bit_of_the_parameters_moves_is_excused_in_that_tensor_alone():
    good = {"gradients": {"a": np.ones(2), "b": np.ones(2)}}
    moved = [{"gradients": {"a": np.array([1.0, 1.0 + bit]), "b": np.ones(2)}} for bit in (1e-6, -4e-5)]

    def departs(a, b, moved):
        return compare({"gradients": {"a": np.full(2, 1 + a), "b": np.full(2, 1 + b)}}, good, 1e-5, moved)

    excused = departs(1.5e-4, 0.0, moved)
    assert excused.first is None and excused.remark == "a bit of the parameters moves gradients: a by 4.0e-05"
    assert excused.largest == pytest.approx(1.5e-4) and excused.tolerance == pytest.approx(1.6e-4)
    assert departs(1.7e-4, 0.0, moved).first.startswith("gradients: a")
    other = departs(1.5e-4, 2e-5, moved)
    assert other.first.startswith("gradients: b") and (other.largest, other.tolerance) == (pytest.approx(2e-5), 1e-5)
    assert departs(9e-6, 0.0, [good]).tolerance == 1e-5


def test_no_move_excuses_what_bfloat16_loses():
    good, lost = ({"gradients": {"a": np.array([x])}} for x in (1.0, 1.0 + 2.0**-9))
    for wild in (2.0, np.nan):
        assert compare(lost, good, 1e-5, [{"gradients": {"a": np.array([wild])}}]).first is not None


def test_missing_shape_dtype_and_nan_depart():
    good = {"state": {"x": np.ones(2, np.float32)}}
    for bad, told in (
        ({}, "missing here"),
        ({"x": np.ones(3, np.float32)}, "float32[3] against float32[2]"),
        ({"x": np.ones(2, np.float64)}, "float64[2] against float32[2]"),
        ({"x": np.array([1, np.nan], np.float32)}, "not a number"),
    ):
        result = compare({"state": bad}, good, 1e-5)
        assert told in result.first and result.largest == np.inf


def test_without_tolerance_every_bit_counts():
    x = np.array([1.0], np.float32)
    assert compare({"s": {"x": np.nextafter(x, 2)}}, {"s": {"x": x}}, 0.0).first is not None
    assert compare({"s": {"x": x}}, {"s": {"x": x}}, 0.0).first is None
