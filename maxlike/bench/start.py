"""Seconds from the command to the first training step, with and without a compile cache."""

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

PATIENCE = 600.0  # seconds


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Runs the real command: each repetition once with nothing cached, data layers included, and once after that."""
    name = experiment.config.name if experiment.config else "quickstart"
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(_first_step(name, pathlib.Path(folder), "cold"))
            warm.append(_first_step(name, pathlib.Path(folder), "warm"))
    goals = ("<= 25", "<= 12") if name == "quickstart" else ("", "")
    quantities = [
        Quantity("command to first step, cold", "s", cold, goals[0]),
        Quantity("command to first step, warm compile cache", "s", warm, goals[1]),
    ]
    return Result(f"start_{name.replace('/', '_')}", device_word(), quantities)


def _first_step(name: str, folder: pathlib.Path, run: str) -> float:
    """Seconds until the metrics of step 1 are on disk; then the process is ended."""
    command = [sys.executable, "-m", "launch", "--experiment", name, "--run_dir", str(folder / run)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
    environment |= {"MAXLIKE_CACHE": str(folder / "cache")}
    for name in ("XLA_FLAGS", "GLIBC_TUNABLES"):  # the launcher sets them, which takes time and counts
        environment.pop(name, None)
    metrics = folder / run / "metrics.jsonl"
    began = time.perf_counter()
    with (
        open(folder / f"{run}.log", "w+") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while not _has_step(metrics):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    log.seek(0)
                    raise UserError(f"{name} made no step: {log.read()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()


def _has_step(metrics: pathlib.Path) -> bool:
    if not metrics.is_file():
        return False
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return any(json.loads(line)["split"] == "train" for line in lines)
