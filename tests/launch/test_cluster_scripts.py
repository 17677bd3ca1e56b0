"""The scripts for Cloud TPU and Slurm, against commands of the same names that record how they were called. The fake
`gcloud` has one worker: a folder in which it really runs what it is asked to run there."""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = [*sorted((LAUNCH / "cloud_tpu").glob("*.sh")), *sorted((LAUNCH / "slurm").glob("*.sh"))]
PLACE = "--zone europe-west4-b --project p"

GCLOUD = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
case "$4" in
  describe) [[ -s "$WORLD/states" ]] || exit 1
    head -n 1 "$WORLD/states"; sed -i 1d "$WORLD/states" ;;
  scp) cp "$5" "$WORLD/worker/maxlike.tar.gz" ;;
  ssh) cd "$WORLD/worker" && exec bash -c "${*: -1}" ;;
esac
"""
RECORD = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
"""
HOSTNAMES = RECORD + 'if [[ "$1" == show ]]; then printf "node7\\nnode8\\n"; fi\n'
SRUN = RECORD + 'shift; SLURM_NTASKS=2 SLURM_PROCID=1 PATH="$WORLD/bin:$PATH" "$@"\n'
# The launcher on a worker: runs until it is told to stop, which it notes.
LAUNCHER = """#!/usr/bin/env bash
{ printf '%q ' "$@"; echo; } >> "$WORLD/launched"
trap 'echo saved >> "$WORLD/launched"; exit 0' TERM
while [[ -d "$WORLD" ]]; do sleep 0.02; done
"""


class World:
    def __init__(self, path: pathlib.Path):
        self.path, self.calls_file = path, path / "calls"
        (path / "bin").mkdir()
        (path / "worker" / "maxlike").mkdir(parents=True)
        (path / "worker" / "maxlike-env" / "bin").mkdir(parents=True)
        self.states()
        self.command("bin/gcloud", GCLOUD)
        self.command("worker/maxlike-env/bin/python", LAUNCHER)
        self.env = {
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "WORLD": str(path),
            "MAXLIKE_TPUS": str(path / "memory"),
            "TPU_ZONE": "europe-west4-b",
            "TPU_PROJECT": "p",
        }

    def command(self, name, text):
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def states(self, *states):
        (self.path / "states").write_text("".join(f"{state}\n" for state in states))

    def run(self, script, *arguments, code=0, **env):
        done = subprocess.run(
            [LAUNCH / script, *arguments], env=os.environ | self.env | env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def calls(self):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [shlex.join(shlex.split(line)) for line in lines]

    def launched(self):
        path = self.path / "launched"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def world(tmp_path):
    (tmp_path / "world").mkdir()
    world = World(tmp_path / "world")
    yield world
    pid = world.path / "worker" / "launch.pid"
    if pid.is_file():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def eventually(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_scripts_are_clean():
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck is missing: pip install 'maxlike[test]'"
    done = subprocess.run([found, "-x", "-P", "SCRIPTDIR", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
    (line,) = world.run("cloud_tpu/run.sh", *arguments).splitlines()
    words = shlex.split(line)
    assert words[:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "n", "--zone", "europe-west4-b"]
    assert words[-4:-1] == ["--worker", "all", "--command"]
    assert r"-m launch --experiment llama_1b --set steps\ =\ 5 )" in words[-1]


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
            os.kill(int((world.path / "worker" / "launch.pid").read_text()), signal.SIGKILL)
        other.kill()


def test_a_tpu_that_was_taken_back_is_asked_for_set_up_and_started_again(world):
    world.command("bin/python3", RECORD)  # the worker's own, which installs
    world.run("cloud_tpu/create.sh", "n", "--type", "v5litepod-16", "--spot")
    world.run("cloud_tpu/setup.sh", "n")
    world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e")
    eventually(lambda: len(world.launched()) == 1)
    os.kill(int((world.path / "worker" / "launch.pid").read_text()), signal.SIGKILL)
    first = [call for call in world.calls() if call.startswith("gcloud")]
    world.states("SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    shutil.rmtree(world.path / "worker" / "maxlike")  # another machine
    world.run("cloud_tpu/resume.sh", "n", "--poll", "1")
    eventually(lambda: len(world.launched()) == 2)
    assert (world.path / "worker" / "maxlike" / "setup.py").is_file()
    again = [call for call in world.calls() if call.startswith("gcloud")]
    describe = f"gcloud compute tpus queued-resources describe n {PLACE} --format 'value(state.state)'"
    delete = f"gcloud compute tpus queued-resources delete n {PLACE} --force --quiet"
    assert again[:5] == [describe, delete, first[0], describe, describe]
    assert [call.split()[:5] for call in again[5:]] == [call.split()[:5] for call in first[1:]]
    assert [call for call in again[5:] if " scp " not in call] == [call for call in first[1:] if " scp " not in call]
    world.states("SUSPENDED", "WAITING_FOR_RESOURCES", "FAILED")
    assert "try later" in world.run("cloud_tpu/resume.sh", "n", "--poll", "1", code=2)
    world.calls()
    world.run("cloud_tpu/delete.sh", "n")
    assert world.calls() == [delete]
    assert "was not started from here" in world.run("cloud_tpu/resume.sh", "n", code=2)


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
    world.command("bin/scontrol", HOSTNAMES)
    world.command("bin/srun", SRUN)
    world.command("bin/python", RECORD + f"exit {ends}\n")
    job = {"SLURM_JOB_ID": "20011", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": str(restarts)}
    world.run("slurm/job.sh", "--experiment", "e", "--set", "x = 'a b'", code=code, **job)
    calls = world.calls()
    assert calls[0] == "scontrol show hostnames 'node[7-8]'"
    place = "--coordinator node7:20011 --processes 2 --process 1"
    assert calls[2] == shlex.join(["python", "-m", "launch", "--experiment", "e", "--set", "x = 'a b'", *place.split()])
    assert calls[3:] == (["scontrol requeue 20011"] if ends in (75, 137) and code == 0 else [])


def test_before_its_time_is_up_a_slurm_job_saves_and_queues_again(world):
    world.command("bin/scontrol", HOSTNAMES)
    world.command("bin/srun", SRUN)
    world.command("bin/python", f'#!/usr/bin/env bash\necho $$ > "$WORLD/pid"\n{LAUNCHER}')
    world.command("bin/scancel", RECORD + 'kill -TERM "$(cat "$WORLD/pid")"\n')
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node7"}
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
        ("slurm/submit.sh", ["--nodes", "1", "--gpus", "1", "--", "--experiment", "e"], "give the job a NAME"),
        ("slurm/submit.sh", ["j", "--gpus", "1", "--", "--experiment", "e"], "--nodes : give a number"),
        ("slurm/submit.sh", ["j", "--nodes", "1", "--gpus", "x", "--", "--experiment", "e"], "--gpus x: give a number"),
        ("slurm/submit.sh", ["j", "--nodes", "1", "--gpus", "1"], "give the flags of python -m launch behind --"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(world, script, arguments, message):
    error = world.run(script, *arguments, code=2)
    assert message in error and error.startswith(f"{script.split('/')[1]}: ") and len(error.splitlines()) == 1
    assert world.calls() == []


def test_a_zone_is_needed_and_help_is_the_comment_on_top(world):
    assert "give --zone" in world.run("cloud_tpu/delete.sh", "n", code=2, TPU_ZONE="")
    for script in SCRIPTS:
        if os.access(script, os.X_OK) and script.name != "job.sh":
            assert world.run(script, "--help").startswith(script.name)
