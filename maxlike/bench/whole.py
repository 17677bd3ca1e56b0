"""The whole of an experiment as a user runs it: how long it takes, and how well it predicts text it has not seen."""

import bz2
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word
from maxlike.errors import UserError
from maxlike.experiment import Experiment


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Trains the named experiment to its end, `repeats` times, with nothing cached; `steps` does not matter here."""
    if experiment.config is None:
        raise UserError("name an experiment, such as --experiment quickstart: it is launched as a command")
    seconds, bits = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            _launch(experiment.config.name, pathlib.Path(folder))
            seconds.append(time.perf_counter() - began)
            lines = [json.loads(line) for line in (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        bits.append([line["bits_per_byte"] for line in lines if line["split"] == "validation"][-1])
    goal = "<= 2.05" if experiment.config.name == "quickstart" else ""
    quantities = [
        Quantity("validation, ours", "bits/byte", bits, goal),
        Quantity("validation, bzip2 -9", "bits/byte", [_bzip2(experiment)]),
        Quantity("command to report", "s", seconds),
    ]
    return Result(f"whole_{experiment.config.name.replace('/', '_')}", device_word(), quantities)


def _launch(name: str, folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "launch", "--experiment", name, "--run_dir", str(folder / "run")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
    environment |= {"MAXLIKE_CACHE": str(folder / "cache")}
    for launchers_own in ("XLA_FLAGS", "GLIBC_TUNABLES"):
        environment.pop(launchers_own, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{name} failed: {done.stderr[-2000:]}")


def _bzip2(experiment: Experiment) -> float:
    """Bits a byte that bzip2 -9 needs for the validation text alone."""
    text = "".join(
        document
        for source in experiment.data.validation.values()
        for part in range(len(source.parts()))
        for _, document in source.read(part, collections.Counter())
    ).encode()
    return 8 * len(bz2.compress(text, 9)) / len(text)
