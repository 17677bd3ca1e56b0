import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys

import pytest

from maxlike import manifest
from maxlike.errors import UserError
from maxlike.run_dir import RunDirectory

HOLD = """
import os, sys
from maxlike.run_dir import RunDirectory
run = RunDirectory(sys.argv[1])
worker = os.fork()
if worker == 0:
    print(os.getpid(), flush=True)  # by now it has let go of the lock that it was born with
    sys.stdin.read()  # a data worker that outlives its parent
    os._exit(0)
sys.stdin.read()
"""


def test_a_second_process_is_refused_by_name_and_the_lock_dies_with_its_holder(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    worker = int(child.stdout.readline())
    with pytest.raises(UserError, match=rf"in use by process {child.pid} on {socket.gethostname()}.*--run_dir"):
        RunDirectory(tmp_path / "run")
    RunDirectory(tmp_path / "run", mode="read")
    child.send_signal(signal.SIGKILL)
    child.wait()
    os.kill(worker, 0)  # the orphan lives, and holds no lock
    with RunDirectory(tmp_path / "run"), pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunDirectory(tmp_path / "run")
    RunDirectory(tmp_path / "run").close()
    child.stdin.close()
    child.stdout.close()


def test_names_and_no_way_out(tmp_path):
    with RunDirectory(tmp_path / "a/b") as run:
        names = {run.config, run.metrics, run.checkpoints, run.events, run.report, run.file("loss.png")}
        assert {path.name for path in names} == {
            "config.gin", "metrics.jsonl", "checkpoints", "events", "report.html", "loss.png",
        }  # fmt: skip
        assert {path.parent for path in names} == {tmp_path / "a/b"}
        for name in ("../x", "/etc/passwd", "a/../../x"):
            with pytest.raises(UserError, match="out of the run directory"):
                run.file(name)


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\): .* --run_dir"):
        RunDirectory(tmp_path / "file/run")

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)  # root writes anywhere: permissions would not refuse it
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        RunDirectory(tmp_path / "run")


def test_reading_changes_nothing_and_joining_does_not_lock(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        RunDirectory(tmp_path / "run", mode="read")
    assert list(tmp_path.iterdir()) == []
    RunDirectory(tmp_path / "run", mode="join")
    RunDirectory(tmp_path / "run", mode="read")
    assert list((tmp_path / "run").iterdir()) == []
    with RunDirectory(tmp_path / "run"):
        RunDirectory(tmp_path / "run", mode="join")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.write_text("config.gin", "old")

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(manifest.os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                run.write_text("config.gin", "new")
        assert run.config.read_text() == "old"
        run.write_text("config.gin", "new")
        assert run.config.read_text() == "new"
        assert stat.S_ISREG(run.config.stat().st_mode)
    assert sorted(path.name for path in pathlib.Path(tmp_path).iterdir()) == ["config.gin", "lock"]
