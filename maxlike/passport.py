"""The passport of a run's parameters: which checkpoints they came from, and what was done to them on the way.

It travels in the metadata of every checkpoint as a list of stamps, oldest first. A run that began with random numbers
has none; each tool that takes parameters out of a checkpoint (WarmStart, Upcycle, Deepen, `--job quantize`, an import)
adds one to those that the checkpoint had.
"""

import hashlib
import pathlib

from maxlike import checkpoint_files as files
from maxlike import manifest
from maxlike.checkpoint_files import Record

Stamp = dict  # JSON
SHOWN = 12  # digits of a fingerprint: enough to tell the checkpoints of a person apart


def stamped(tool: str, directory: pathlib.Path, record: Record, tree: str, done: dict) -> list[Stamp]:
    """The passport of parameters that `tool` took from the tree ("params", "ema") of a checkpoint.

    done: what the tool did, JSON: a mapping, the layers, the names that it left fresh.
    """
    config = record.metadata.get("config", "")
    stamp = {
        "tool": tool,
        "from": str(directory),
        "step": record.step,
        "tree": tree,
        "checkpoint": _digest((directory / manifest.NAME).read_bytes()),
        "config": _digest(config.encode()) if config else "not recorded",
        "code": record.metadata.get("code", "not recorded"),
        "done": done,
    }
    return [*record.metadata.get("passport", []), stamp]


def imported(source: pathlib.Path, architecture: str, code: str) -> list[Stamp]:
    """The passport of weights that another library trained."""
    return [{"tool": "import", "from": str(source), "done": {"architecture": architecture}, "code": code}]


def read(checkpoint: pathlib.Path) -> list[Stamp]:
    """The passport in a checkpoint directory; empty where its run began with random numbers."""
    files.quieten_orbax()
    return files.read_record(checkpoint).metadata.get("passport", [])


def line(passport: list[Stamp]) -> str:
    """The passport in one line, newest first; '' where it is empty."""
    if not passport:
        return ""
    return "parameters " + ", ".join(_words(stamp) for stamp in reversed(passport))


def _words(stamp: Stamp) -> str:
    at = (
        f" step {stamp['step']} (checkpoint {stamp['checkpoint']}, config {stamp['config']})" if "step" in stamp else ""
    )
    done = ", ".join(f"{name} {value}" for name, value in stamp["done"].items())
    return f"from {stamp['from']}{at} by {stamp['tool']}{f' ({done})' if done else ''}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:SHOWN]
