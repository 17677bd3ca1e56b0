"""What all scripts of launch/ share, those for Slurm, and starting a command again."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.cluster import LAUNCH, LAUNCHER, RECORD, SCRIPTS, SRUN, eventually


def test_the_scripts_are_clean():
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck is missing: pip install 'maxlike[test]'"
    done = subprocess.run([found, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("code", "runs"), [(75, 3), (137, 3), (0, 1), (2, 1), (1, 1)])
def test_a_command_whose_peer_was_lost_is_run_again(world, code, runs):
    world.command("bin/job", RECORD + f"exit {code}\n")
    error = world.run("restart.sh", "--restarts", "2", "--pause", "0", "--", "job", "a b", code=code)
    assert world.calls() == ["job 'a b'"] * runs
    assert f"exit code {code}): again in 0 s, restart 2 of 2" in error if runs > 1 else "again" not in error


@pytest.mark.parametrize("pausing", [False, True])
def test_sigterm_reaches_the_command_or_ends_the_pause(world, pausing):
    world.command("bin/job", RECORD + "exit 75\n" if pausing else LAUNCHER)
    process = subprocess.Popen([LAUNCH / "restart.sh", "--pause", "600", "--", "job"], env=os.environ | world.env)
    eventually(lambda: world.calls_file.exists() if pausing else len(world.launched()) == 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == (75 if pausing else 0)
    assert pausing or world.launched()[1:] == ["saved"]


def test_a_slurm_job_is_queued(world):
    world.command("bin/sbatch", RECORD)
    flags = ["j", "--nodes", "2", "--gpus", "8", "--time", "1-00:00:00", "--partition", "h100"]
    launch = ["--", "--experiment", "e", "--set", "x = 1"]
    printed = world.run("slurm/submit.sh", *flags, "--dry_run", *launch)
    assert world.calls() == []
    world.run("slurm/submit.sh", *flags, *launch)
    (call,) = world.calls()
    assert call == shlex.join(shlex.split(printed))
    assert call.startswith("sbatch --job-name j --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --requeue ")
    assert call.endswith(f"--time 1-00:00:00 --partition h100 {LAUNCH / 'slurm/job.sh'} --experiment e --set 'x = 1'")


@pytest.mark.parametrize(("ends", "restarts", "code"), [(0, 0, 0), (75, 0, 0), (137, 19, 0), (75, 20, 75), (2, 0, 2)])
def test_a_slurm_job_starts_the_processes_and_queues_again_after_a_loss(world, ends, restarts, code):
    world.command("bin/scontrol", RECORD)
    world.command("bin/srun", SRUN)
    world.command("bin/python", RECORD + f"exit {ends}\n")
    job = {"SLURM_JOB_ID": "20011", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(restarts)}
    world.run("slurm/job.sh", "--experiment", "e", "--set", "x = 'a b'", code=code, **job)
    calls = world.calls()
    command = shlex.join(["python", "-m", "launch", "--experiment", "e", "--set", "x = 'a b'"])
    assert calls[:2] == [f"srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task=8 {command}", command]
    assert calls[2:] == (["scontrol requeue 20011"] if ends in (75, 137) and code == 0 else [])


def test_before_its_time_is_up_a_slurm_job_saves_and_queues_again(world):
    world.command("bin/scontrol", RECORD)
    world.command("bin/srun", SRUN)
    world.command("bin/python", f'#!/usr/bin/env bash\necho $$ > "$WORLD/pid"\n{LAUNCHER}')
    world.command("bin/scancel", RECORD + 'kill -TERM "$(cat "$WORLD/pid")"\n')
    job = {"SLURM_JOB_ID": "1"}
    process = subprocess.Popen([LAUNCH / "slurm/job.sh", "--experiment", "e"], env=os.environ | world.env | job)
    eventually(lambda: len(world.launched()) == 1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert world.launched()[-1] == "saved"
    assert world.calls()[-2:] == ["scancel --signal TERM 1", "scontrol requeue 1"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("cloud_tpu/create.sh", ["--type", "v6e-8"], "give the TPU's NAME first"),
        ("cloud_tpu/create.sh", ["Big!", "--type", "v6e-8"], "give the TPU's NAME first"),
        ("cloud_tpu/create.sh", ["n"], "give --type"),
        ("cloud_tpu/create.sh", ["n", "--type", "v9-8"], "--type v9-8: its runtime is not known here"),
        ("cloud_tpu/create.sh", ["n", "--type"], "--type needs a value"),
        ("cloud_tpu/create.sh", ["n", "--type", "--spot"], "--type needs a value"),
        ("cloud_tpu/create.sh", ["n", "--tpye", "v6e-8"], "unknown flag --tpye"),
        ("cloud_tpu/create.sh", ["n", "--slices", "0", "--type", "v6e-8"], "--slices 0: give a number of at least 1"),
        ("cloud_tpu/setup.sh", ["n", "more"], "more is one word too many"),
        ("cloud_tpu/run.sh", ["n"], "give the flags of python -m launch behind --"),
        ("cloud_tpu/run.sh", ["n", "--experiment", "e"], "unknown flag --experiment"),
        ("cloud_tpu/logs.sh", ["n", "--worker", "x"], "--worker x: give a number, or all"),
        ("cloud_tpu/resume.sh", ["n"], "n was not started from here"),
        ("cloud_tpu/delete.sh", [], "give the TPU's NAME first"),
        ("restart.sh", ["--pause", "1"], "give the command behind --"),
        ("restart.sh", ["--restarts", "-1", "--", "true"], "--restarts -1: give a number"),
        ("slurm/submit.sh", ["--nodes", "1", "--gpus", "1", "--", "--experiment", "e"], "give the job a NAME"),
        ("slurm/submit.sh", ["j", "--gpus", "1", "--", "--experiment", "e"], "--nodes : give a number"),
        ("slurm/submit.sh", ["j", "--nodes", "1", "--gpus", "x", "--", "--experiment", "e"], "--gpus x: give a number"),
        ("slurm/submit.sh", ["j", "--nodes", "1", "--gpus", "1"], "give the flags of python -m launch behind --"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(world, script, arguments, message):
    error = world.run(script, *arguments, code=2)
    assert message in error and error.startswith(f"{script.split('/')[-1]}: ") and len(error.splitlines()) == 1
    assert world.calls() == []


def test_a_zone_is_needed_and_help_is_the_comment_on_top(world):
    assert "give --zone" in world.run("cloud_tpu/delete.sh", "n", code=2, TPU_ZONE="")
    for script in SCRIPTS:
        if os.access(script, os.X_OK) and script.name != "job.sh":  # which no person runs
            assert world.run(script, "--help").startswith(script.name)
