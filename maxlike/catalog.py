"""The gin files that can be named on the command line: experiments, overlays and jobs.

Names are paths under the `experiments` package without `.gin`: `quickstart`, `papers/moma`, `mesh/fsdp`. A folder
`experiments` in the working directory is searched first, so that a user's files stand beside ours. No jax here:
`--list` and `--help` must answer at once.
"""

import difflib
import importlib.resources
import pathlib
from typing import Literal

from maxlike.errors import UserError

Kind = Literal["experiment", "overlay", "job"]
# Where each kind lives under `experiments`; a mesh is an overlay that also answers to its own folder's name.
FOLDERS: dict[str, tuple[str, ...]] = {"experiment": ("",), "overlay": ("overlays", "mesh"), "job": ("jobs",)}
NOT_EXPERIMENTS = ("overlays", "mesh", "jobs", "data", "parts")


def roots() -> list[pathlib.Path]:
    """Folders that hold experiment files, in the order they are searched."""
    shipped = pathlib.Path(str(importlib.resources.files("experiments")))
    local = pathlib.Path.cwd() / "experiments"
    return [local, shipped] if local.is_dir() and local.resolve() != shipped.resolve() else [shipped]


def names(kind: Kind) -> dict[str, pathlib.Path]:
    """Every name of a kind, sorted, with its file."""
    found: dict[str, pathlib.Path] = {}
    for root in roots():
        for folder in FOLDERS[kind]:
            for path in sorted((root / folder).rglob("*.gin")):
                relative = path.relative_to(root).with_suffix("")
                if kind == "experiment" and relative.parts[0] in NOT_EXPERIMENTS:
                    continue
                name = relative.as_posix()
                for prefix in ("overlays/", "jobs/"):
                    name = name.removeprefix(prefix)
                found.setdefault(name, path)
    return dict(sorted(found.items()))


def find(kind: Kind, name: str) -> pathlib.Path:
    """The file of a name, or the file itself where `name` is a path that ends in `.gin`."""
    if name.endswith(".gin"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise UserError(f"there is no {kind} file {name}: give an existing .gin file or a name from --list")
        return path
    known = names(kind)
    if name in known:
        return known[name]
    raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}; --list shows all of them")


def nearest(name: str, known) -> str:
    """A clause ': did you mean ...?' where something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f": did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def doc(path: pathlib.Path) -> str:
    """The first comment line of a gin file: its one-line documentation."""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
        if line.strip():
            break
    return ""
