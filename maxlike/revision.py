"""Which code is running: the version of the package, and the git commit where it runs from a checkout."""

import functools
import importlib.metadata
import pathlib
import subprocess


@functools.cache
def revision() -> str:
    """The version of the package; where it runs from a git checkout, also its commit, with '-dirty' behind it where
    tracked files have been changed since."""
    version, at = importlib.metadata.version("maxlike"), commit(pathlib.Path(__file__))
    return version if at is None else f"{version}, commit {at}"


def commit(file: pathlib.Path) -> str | None:
    """The commit of the checkout that tracks `file`; a package installed inside somebody's checkout is not tracked."""
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return (
        None if tracked is None else _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    )


def _git(folder: pathlib.Path, *arguments: str) -> str | None:
    """git's answer; None where there is no git, or it finds nothing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
