"""A job on simulated devices, and a job whose answer is no."""

import os

import pytest

from launch import __main__ as launcher
from launch import environment, simulated, xla_flags
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


@pytest.mark.parametrize(
    ("installed", "expected"), [({"libtpu"}, "cpu"), (set(), None), ({"libtpu", "jax_plugins"}, None)]
)
def test_jax_is_told_that_there_is_no_tpu_where_libtpu_alone_would_look_for_one(installed, expected, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(environment, "platform", lambda: "cpu")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(environment.pathlib.Path, "glob", lambda folder, pattern: [])
    environment.skip_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected
    monkeypatch.setenv("JAX_PLATFORMS", "")
    environment.skip_absent_tpu()
    assert os.environ["JAX_PLATFORMS"] == ""  # what the user has set, be it nothing


def test_a_plan_for_a_tpu_is_compiled_with_the_tpus_flags(monkeypatch, tmp_path):
    """On a machine without one, whatever group of them is asked for; other jobs and targets take this machine's."""
    installed = {"libtpu"}
    monkeypatch.setattr(simulated.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert simulated.compiles_for("plan", ["--topology", "v6e:8x8"]) == "tpu"
    for job, flags in (
        ("train", ["--topology", "v6e:8x8"]),
        ("plan", ["--topology=cpu:8"]),
        ("plan", ["--topology=local"]),
        ("plan", ["--hardware", "v6e"]),
    ):
        assert simulated.compiles_for(job, flags) is None
    monkeypatch.setenv("MAXLIKE_CACHE", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # the process is not to be started again
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setattr(xla_flags, "accepted", lambda platform, flags, record: flags)
    environment.prepare(["large_vmem"], simulated.compiles_for("plan", ["--topology=v6e:8x8"]))
    table = xla_flags.TABLE["tpu"]
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [f.text for f in (*table["default"], *table["large_vmem"])]
    assert os.environ["XLA_FLAGS"] == ""
    installed.clear()  # the job itself says what is missing
    assert simulated.compiles_for("plan", ["--topology", "v6e:8x8"]) is None


def test_a_yes_or_no_flag_is_a_switch():
    def job(*, search: bool = False, top: int = 10):
        pass

    flags = [launcher._job_flags(job, line.split(), "plan") for line in ("--search", "--search --top 2")]
    assert flags == [{"search": True}, {"search": True, "top": 2}]
    assert launcher._job_flags(job, ["--search", "false", "--top=3"], "plan") == {"search": False, "top": 3}


def test_a_no_is_a_sentence_and_exit_code_1(monkeypatch, capsys):
    def job(argv):
        raise Failed("1 of 2 rows do not hold: scan")

    monkeypatch.setattr(launcher, "_run", job)
    assert launcher.main() == 1
    assert capsys.readouterr().err == "maxlike: 1 of 2 rows do not hold: scan\n"
