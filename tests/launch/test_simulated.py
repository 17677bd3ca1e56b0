"""A job on simulated devices, and a job whose answer is no."""

import os

import pytest

from launch import __main__ as launcher
from launch import simulated
from maxlike.errors import Failed


@pytest.mark.parametrize("present", ["", "--xla_force_host_platform_device_count=16"])
def test_the_check_gets_devices_unless_the_user_has_set_their_number(present, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", present)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    simulated.prepare("train", [])
    assert os.environ["XLA_FLAGS"] == present
    simulated.prepare("check", ["--rows", "scan"])
    flags = os.environ["XLA_FLAGS"].split()
    assert f"--xla_force_host_platform_device_count={16 if present else 8}" in flags
    assert len([flag for flag in flags if "device_count" in flag]) == 1
    assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_a_no_is_a_sentence_and_exit_code_1(monkeypatch, capsys):
    def job(argv):
        raise Failed("1 of 2 rows do not hold: scan")

    monkeypatch.setattr(launcher, "_run", job)
    assert launcher.main() == 1
    assert capsys.readouterr().err == "maxlike: 1 of 2 rows do not hold: scan\n"
