"""A cluster for tests of the scripts: commands of the real names that record how they were called.

The fake `gcloud` has one worker: a folder in which it really runs what it is asked to run there.
"""

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import time

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*/*.sh")])
PLACE = "--zone europe-west4-b --project p"

GCLOUD = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
case "$4" in
  describe)
    state="$(head -n 1 "$WORLD/states")"
    sed -i 1d "$WORLD/states"
    if [[ "$state" != [A-Z]* ]]; then
      missing="NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/$5' was not found."
      echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) ${state:-$missing}" >&2
      exit 1
    fi
    echo 'WARNING: a newer gcloud is there' >&2
    echo "$state" ;;
  scp)
    if [[ -s "$WORLD/refusals" ]]; then
      sed -i 1d "$WORLD/refusals"
      exit 255
    fi
    cp "$5" "$WORLD/worker/maxlike.tar.gz" ;;
  ssh) cd "$WORLD/worker" && exec bash -c "${*: -1}" ;;
esac
"""
RECORD = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >> "$CALLS"
"""
SRUN = RECORD + 'while [[ "$1" == --* ]]; do shift; done; PATH="$WORLD/bin:$PATH" "$@"\n'
# The launcher on a worker: runs until it is told to stop, which it notes.
LAUNCHER = """#!/usr/bin/env bash
echo $$ > "$WORLD/launcher"
{ printf '%q ' "$@"; echo; } >> "$WORLD/launched"
trap 'echo saved >> "$WORLD/launched"; exit 0' TERM
while [[ -d "$WORLD" ]]; do sleep 0.02; done
"""


class World:
    def __init__(self, path: pathlib.Path):
        self.path, self.calls_file = path, path / "calls"
        (path / "bin").mkdir()
        (path / "worker" / "maxlike").mkdir(parents=True)
        (path / "worker" / "maxlike" / "launch").symlink_to(LAUNCH)
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

    def crash(self):
        """Ends what runs on the worker, as the loss of the machine does."""
        for pid in (self.path / "worker" / "launch.pid", self.path / "launcher"):
            if pid.is_file():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid.read_text()), signal.SIGKILL)

    def calls(self):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [shlex.join(shlex.split(line)) for line in lines]

    def launched(self):
        path = self.path / "launched"
        return path.read_text().splitlines() if path.exists() else []


def eventually(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def started(world):
    """Asks for a TPU, sets it up and starts a command there; the calls that did it."""
    world.command("bin/python3", RECORD)  # the worker's own, which installs
    world.command("bin/sleep", "#!/usr/bin/env bash\nexec /bin/sleep 0.1\n")
    world.run("cloud_tpu/create.sh", "n", "--type", "v5litepod-16", "--spot")
    world.run("cloud_tpu/setup.sh", "n")
    world.run("cloud_tpu/run.sh", "n", "--", "--experiment", "e")
    eventually(lambda: len(world.launched()) == 1)
    return [call for call in world.calls() if call.startswith("gcloud")]
