"""Records beside a run: what it was to be, and how it ended, so that it is made once and never mixed with another.

`planned.json` is written before a run begins, `finished.json` when it has ended. A run whose record has another
fingerprint is refused rather than overwritten: what is there was trained by somebody.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax

from maxlike.config import bindings_of
from maxlike.data import files
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.manifest import write_text
from maxlike.revision import revision

PLANNED, FINISHED = "planned.json", "finished.json"
# What does not change a run: where data are kept and who reads them, and what watches it.
_WITHOUT_EFFECT = re.compile(r"(data\.Data|pictures\.Pictures)\.(cache|workers|build_workers) =|\S*Watchdog\.\w+ =")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of a run: its bindings, its data and the run that it begins from."""

    lines: tuple[str, ...]

    @classmethod
    def of(cls, experiment: Experiment, identity: dict[str, str], ancestor: "Fingerprint | None") -> "Fingerprint":
        """Of an experiment with its operative configuration. identity: fingerprints of its data. ancestor: of the run
        that it begins from; the place of that one does not matter then."""
        lines = [line for line in bindings_of(experiment.config.operative) if not _WITHOUT_EFFECT.match(line)]
        if ancestor is not None:
            source = re.compile(rf"\S*\b{type(experiment.warm_start).__name__}\.source =")
            lines = [line for line in lines if not source.match(line)] + [f"begins from = {ancestor.digest}"]
        return cls(tuple(sorted(lines)) + tuple(f"data, {name} = {value}" for name, value in sorted(identity.items())))

    @property
    def digest(self) -> str:
        return files.digest("run", list(self.lines))


def begin(directory: pathlib.Path, fingerprint: Fingerprint, experiment: str) -> None:
    """Records what is about to run. Raises UserError where the directory holds another run."""
    path = directory / PLANNED
    record = _read(path)
    if record is not None and record.get("fingerprint") != fingerprint.digest:
        raise UserError(
            f"{directory} holds a run of another configuration ({_first_difference(record, fingerprint)}): remove that "
            "directory to run it anew, or name another --run_dir"
        )
    if record is None:
        if (directory / "metrics.jsonl").exists():
            raise UserError(f"{directory} holds a run that no comparison made: remove it, or name another --run_dir")
        directory.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": fingerprint.digest, "experiment": experiment, "lines": list(fingerprint.lines)}
        write_text(path, json.dumps(content, indent=1) + "\n")


def finish(directory: pathlib.Path, fingerprint: Fingerprint, diverged: str | None, seconds: float) -> None:
    """Records that the run has ended. diverged: why before its last step, or None. seconds: since it was last begun."""
    device = jax.devices()[0]
    content = {
        "fingerprint": fingerprint.digest,
        "diverged": diverged,
        "seconds": round(seconds, 1),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "code": revision(),
    }
    write_text(directory / FINISHED, json.dumps(content, indent=1) + "\n")


def ended(directory: pathlib.Path, fingerprint: Fingerprint) -> dict[str, Any] | None:
    """The record of a run that has ended, None where it has not."""
    record = _read(directory / FINISHED)
    return record if record is not None and record.get("fingerprint") == fingerprint.digest else None


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: remove {path.parent} to run it anew")
    return record


def _first_difference(record: dict[str, Any], fingerprint: Fingerprint) -> str:
    """The first knob in which they differ, with both values, for a person."""
    then, now = set(record.get("lines", ())), set(fingerprint.lines)
    gone, new = sorted(then - now), sorted(now - then)
    if not gone or not new:
        return f"it {'had' if gone else 'lacked'} {(gone or new or ['something'])[0]}"
    key = gone[0].partition(" = ")[0]
    return f"{gone[0]}, now {next((line for line in new if line.startswith(f'{key} = ')), new[0]).rpartition(' = ')[2]}"
