"""Which code wrote a checkpoint."""

import importlib.metadata
import shutil
import subprocess

import pytest

from maxlike.revision import commit, revision


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_commit_is_of_the_tracked_file_and_says_where_it_changed(tmp_path):
    (tmp_path / "code.py").write_text("1")
    assert commit(tmp_path / "code.py") is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path / "code.py") == head and len(head) == 40
    (tmp_path / "installed.py").write_text("2")  # a package installed inside somebody's checkout
    assert commit(tmp_path / "installed.py") is None
    (tmp_path / "code.py").write_text("3")
    assert commit(tmp_path / "code.py") == f"{head}-dirty"


def test_the_version_comes_first():
    assert revision().split(",")[0] == importlib.metadata.version("maxlike")
