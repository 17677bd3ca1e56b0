"""The table of XLA flags: every flag is known to the installed compiler, and one that is not does no harm."""

import importlib.metadata
import importlib.util
import json
import os

import pytest

from launch import environment, xla_flags
from launch.xla_flags import Flag
from maxlike.errors import UserError


def test_flags_that_this_jaxlib_does_not_know_are_left_out(monkeypatch, tmp_path, capsys):
    known, unknown = Flag("--xla_cpu_enable_fast_math=false", "known"), Flag("--xla_there_is_no_such_flag=1", "unknown")
    monkeypatch.setenv("MAXLIKE_CACHE", str(tmp_path))
    # An answer of an earlier run: only the other flag costs a process.
    version = f"jaxlib {importlib.metadata.version('jaxlib')}"
    (tmp_path / "xla_flags.json").write_text(json.dumps({version: {known.text: True}}))
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # the process is not to be started again
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setitem(xla_flags.TABLE, "cpu", {"default": (known,), "more": (unknown,)})
    monkeypatch.setattr(environment, "platform", lambda: "cpu")
    environment.prepare(["more"])
    assert os.environ["XLA_FLAGS"] == f"--xla_force_host_platform_device_count=2 {known.text}"
    assert "does not know --xla_there_is_no_such_flag=1" in capsys.readouterr().err
    monkeypatch.setattr(xla_flags, "_probe", lambda platform, flags: pytest.fail("asked again"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")  # the user's own value stays
    environment.prepare(["more"])
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true"


def test_groups_are_of_the_hardware(monkeypatch):
    names = [flag.name for flag in xla_flags.chosen("gpu", ["collective_matmul", "collective_matmul"])]
    assert "--xla_gpu_threshold_for_windowed_einsum_mib" in names and len(set(names)) == len(names)
    with pytest.raises(UserError, match="--xla=colective_matmul: did you mean 'collective_matmul'"):
        xla_flags.chosen("gpu", ["colective_matmul"])
    with pytest.raises(UserError, match="the groups of flags for cpu are none"):
        xla_flags.chosen("cpu", ["overlap"])
    assert xla_flags.chosen("metal", []) == []


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_installed_compilers_know_the_whole_table(platform, tmp_path, capsys):
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    flags = [flag for group in xla_flags.TABLE[platform].values() for flag in group]
    assert xla_flags.accepted(platform, flags, tmp_path / "record.json") == flags
    assert capsys.readouterr().err == ""
