"""The scripts for Cloud TPU, against a `gcloud` that records how it was called."""

import os
import shlex
import shutil
import subprocess

import pytest

from tests.launch.cluster import LAUNCH, PLACE, RECORD, eventually, started


def test_a_tpu_is_asked_for(world):
    world.run("cloud_tpu/create.sh", "big", "--type", "v6e-64", "--spot")
    create = "gcloud compute tpus queued-resources create"
    kind = "--accelerator-type v6e-64 --runtime-version v2-alpha-tpuv6e"
    assert world.calls() == [f"{create} big {PLACE} {kind} --node-id big --spot"]
    world.run("cloud_tpu/create.sh", "big", "--type", "v6e-64", "--slices", "2", "--zone", "z", TPU_PROJECT="")
    assert world.calls() == [f"{create} big --zone z {kind} --node-count 2 --node-prefix big"]
    world.run("cloud_tpu/logs.sh", "big", "--worker", "3", "--dry_run", "--slices", "2")
    assert world.calls() == []


def test_a_dry_run_prints_what_a_run_does(world):
    flags = ["n", "--type", "v5p-8"]
    printed = world.run("cloud_tpu/create.sh", *flags, "--dry_run").splitlines()
    assert world.calls() == [] and not (world.path / "memory").exists()
    world.run("cloud_tpu/create.sh", *flags)
    assert [shlex.join(shlex.split(line)) for line in printed] == world.calls()
    arguments = ["n", "--dry_run", "--", "--experiment", "llama_1b", "--set", "steps = 5"]
    printed = world.run("cloud_tpu/run.sh", *arguments).splitlines()
    arguments.remove("--dry_run")
    world.run("cloud_tpu/run.sh", *arguments)
    assert [shlex.join(shlex.split(line)) for line in printed] == world.calls()
    words = shlex.split(printed[-1])
    assert words[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n", "--zone", "europe-west4-b"]
    assert words[-4:-1] == ["--worker", "all", "--command"]
    assert r"-m launch --experiment llama_1b --set steps\ =\ 5 )" in words[-1]
    world.command("bin/python3", RECORD)
    printed = world.run("cloud_tpu/setup.sh", "n", "--dry_run", "--slices", "2").splitlines()
    world.run("cloud_tpu/setup.sh", "n", "--slices", "2")
    done = [call for call in world.calls() if call.startswith("gcloud")]
    assert [shlex.join(shlex.split(line)) for line in printed if line.startswith("gcloud")] == done


def test_a_command_runs_on_the_workers_once_and_stops_with_a_checkpoint(world):
    world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e", "--set", "x = ('a b',)")
    eventually(lambda: len(world.launched()) == 1)
    assert shlex.split(world.launched()[0]) == ["-m", "launch", "--experiment", "e", "--set", "x = ('a b',)"]
    assert "still running" in world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e", code=1)
    world.run("cloud_tpu/run.sh", "n", "--stop")
    eventually(lambda: world.launched()[-1] == "saved")
    assert len(world.launched()) == 2


def test_a_number_that_another_process_has_now_or_that_nobody_waited_for_is_not_running(world):
    with subprocess.Popen(["sleep", "600"]) as other, subprocess.Popen("true") as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        for count, process in enumerate((other, ended), start=1):
            (world.path / "worker" / "launch.pid").write_text(f"{process.pid}\n")
            world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e")
            eventually(lambda count=count: len(world.launched()) == count)
            world.crash()
        other.kill()


def test_a_tpu_that_was_taken_back_is_asked_for_set_up_and_started_again(world):
    first = started(world)
    world.crash()
    world.states("SUSPENDING", "SUSPENDED", "503 try again", "WAITING_FOR_RESOURCES", "ACTIVE")
    shutil.rmtree(world.path / "worker" / "maxlike")  # another machine
    world.run("cloud_tpu/resume.sh", "n", "--poll", "1")
    eventually(lambda: len(world.launched()) == 2)
    assert (world.path / "worker" / "maxlike" / "setup.py").is_file()
    again = [call for call in world.calls() if call.startswith("gcloud")]
    describe = f"gcloud compute tpus queued-resources describe n {PLACE} --format 'value(state.state)'"
    delete = f"gcloud compute tpus queued-resources delete n {PLACE} --force --quiet"
    assert again[:4] == [describe, describe, delete, first[0]] and again[4:7] == [describe] * 3
    assert again[7:] == first[1:]
    world.states("SUSPENDED", "WAITING_FOR_RESOURCES", "FAILED")
    assert "try later" in world.run("cloud_tpu/resume.sh", "n", "--poll", "1", code=2)
    world.calls()
    world.run("cloud_tpu/delete.sh", "n")
    assert world.calls() == [delete]
    assert "was not started from here" in world.run("cloud_tpu/resume.sh", "n", code=2)


@pytest.mark.parametrize(
    "said",
    [
        "could not reach the network",
        "permission 'tpu.queuedResources.get' denied on resource (or it may not exist)",
        "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/n-2' was not found.",
        "NOT_FOUND: Resource 'projects/p' was not found.",
    ],
)
def test_a_state_that_cannot_be_told_is_not_a_missing_tpu(world, said):
    for script in ("create.sh", "setup.sh", "run.sh"):
        (world.path / "memory" / "n").mkdir(parents=True, exist_ok=True)
        (world.path / "memory" / "n" / script).write_bytes(b"n\0")
    world.states(f"({said})")
    error = world.run("cloud_tpu/resume.sh", "n", "--watch", code=2)
    assert error.startswith("resume.sh: the state of n is not known: ERROR") and said in error
    assert len(error.splitlines()) == 1
    assert [call.split()[4] for call in world.calls()] == ["describe"]


def test_what_resume_would_do_is_what_it_does(world):
    started(world)
    for state, scripts in (("ACTIVE", ["run.sh"]), ("", ["create.sh", "setup.sh", "run.sh"])):
        world.states(state)
        printed = world.run("cloud_tpu/resume.sh", "n", "--dry_run", "--watch")
        assert [shlex.split(line)[0] for line in printed.splitlines()] == [
            str(LAUNCH / "cloud_tpu" / script) for script in scripts
        ]
    world.calls()


def test_a_watch_leaves_a_running_command_alone_and_survives_a_network_that_fails(world):
    first = started(world)
    world.states("ACTIVE", "503 try again", "SUSPENDED", "FAILED", "ACTIVE", "ACTIVE")
    watch = subprocess.Popen(
        [LAUNCH / "cloud_tpu/resume.sh", "n", "--watch", "--poll", "1"],
        env=os.environ | world.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: (world.path / "states").read_text().startswith("SUSPENDED"))
    world.crash()
    eventually(lambda: len(world.launched()) == 2)
    world.run("cloud_tpu/delete.sh", "n")
    said = watch.communicate(timeout=60)[1]
    assert watch.returncode == 2 and "still running" in said and "taken for running" in said
    assert "503 try again: looking again in 1 s" in said and "or is deleted since" in said
    calls = [call for call in world.calls() if call.startswith("gcloud") and " describe " not in call]
    creates = [call for call in calls if " create " in call]
    assert creates == [first[0]] * 2 and calls[-1].split()[4] == "delete"


def test_a_new_tpu_that_lets_nobody_in_yet_is_set_up_in_the_end(world):
    world.command("bin/python3", RECORD)
    world.command("bin/sleep", RECORD)
    (world.path / "refusals").write_text("\n" * 9)
    world.run("cloud_tpu/setup.sh", "n")
    assert sum(" scp " in call for call in world.calls()) == 10
    (world.path / "refusals").write_text("\n" * 10)
    assert "did not take it in 10 tries" in world.run("cloud_tpu/setup.sh", "n", code=2)


def test_workers_that_are_not_set_up_are_not_started(world):
    (world.path / "worker" / "maxlike-env" / "bin" / "python").unlink()
    assert "run setup.sh first" in world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e", code=1)
    assert not (world.path / "worker" / "launch.pid").exists()
