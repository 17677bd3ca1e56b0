"""The command line as a user meets it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import __main__ as command
from launch import environment
from tests import tiny

JOIN = ["--experiment", "quickstart", "--join_timeout", "0.1", "--processes", "2", "--coordinator"]


def launch(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"} | options,
    )


@pytest.fixture
def here(monkeypatch):
    """`main` in this process, without touching its environment."""
    monkeypatch.setattr(environment, "prepare", lambda *given: None)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch", *arguments])
        return command.main()

    return main


@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_help_and_list_do_not_import_jax(flag):
    code = f"import sys, runpy; sys.argv = ['launch', {flag!r}]\ntry: runpy.run_module('launch', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code, end.code\nassert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert flag == "--help" or all(word in done.stdout for word in ("llama_8b", "mesh/fsdp", "generate"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name an experiment"),
        (["--experiment", "quikstart"], "unknown experiment 'quikstart': did you mean 'quickstart'"),
        (["--experiment", "quickstart", "--job", "trane"], "unknown job 'trane': did you mean 'train'"),
        (
            ["--experiment", "quickstart", "--overlay", "mesh/fsp"],
            "unknown overlay 'mesh/fsp': did you mean 'mesh/fsdp'",
        ),
        (["--experiment", "quickstart", "--set", "stpes = 3"], "nothing in this experiment uses `stpes = 3`"),
        (["--experiment", "quickstart", "--set", "dim = big"], "is not a gin statement"),
        (["--experiment", "quickstart", "--stps", "3"], "the job train has no flag --stps"),
        (["--experiment", "quickstart", "--job", "data", "--stp", "3"], "no flag --stp: did you mean 'step'"),
        (["--experiment", "quickstart", "--job", "data", "--step", "x"], "--step='x': it takes int"),
        (["--experiment", "quickstart", "--job", "data", "--step"], "--step needs a value"),
        (["--experiment", "quickstart", "loose"], "'loose' is no flag"),
        (["--experiment", "quickstart", "--processes", "2"], "go together"),
        ([*JOIN, "node1", "--process", "0"], "--coordinator='node1': give HOST:PORT of process 0"),
        ([*JOIN, "localhost:1", "--process", "2"], "--process=2: with --processes 2 it is from 0 to 1"),
        (
            [*JOIN, "localhost:1", "--process", "1"],
            "the coordinator localhost:1 could not be reached in 0.1 s (Connection",
        ),
        (
            [*JOIN, "localhost:50007", "--process", "0"],
            "waited 0.1 s at localhost:50007 for process 1 of 2: start every",
        ),
        (
            ["--experiment", "quickstart", "--set", "sharding.Mesh.shape = {'fsdp': 64}"],
            "needs 64 devices and there are 8",
        ),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(here, capsys, arguments, message):
    assert here(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("maxlike: ") and "Traceback" not in error


def test_the_flags_of_a_job_are_shown(here, capsys):
    assert here("--experiment", "quickstart", "--job", "data", "--help") == 0
    assert "--step (default 0)" in capsys.readouterr().out


@pytest.mark.large
def test_killed_and_terminated_runs_go_on_bit_for_bit(tmp_path):
    bindings = tiny.flags("steps = 120", "checkpoint.Checkpoints.every = 20")
    arguments = ["--experiment", "quickstart", *bindings, "--run_dir"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    whole = launch(*arguments, str(straight))
    for number, lines in ((signal.SIGKILL, 30), (signal.SIGTERM, 70)):
        process = launch(*arguments, str(broken))
        deadline = time.monotonic() + 300
        while not (broken / "metrics.jsonl").is_file() or (broken / "metrics.jsonl").read_bytes().count(b"\n") < lines:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        if number == signal.SIGTERM:
            assert process.returncode == 0, err
            assert "checkpoint saved; the same command continues" in " ".join(out.split())
    process = launch(*arguments, str(broken))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resuming" in out
    assert whole.wait() == 0
    assert tiny.losses(broken) == tiny.losses(straight)
    assert len(tiny.losses(broken)) == 120


def test_a_second_process_on_a_run_directory_is_refused(here, tmp_path, capsys):
    from maxlike.run_dir import RunDirectory

    with RunDirectory(tmp_path):
        assert here("--experiment", "quickstart", *tiny.flags(), "--run_dir", str(tmp_path)) == 2
    assert "is in use by process" in capsys.readouterr().err
