"""What a compiled step sends between devices, against the planner's formula, for each layout."""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import jax

from maxlike import config
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word, random_batch
from maxlike.collectives import by_axis, collectives
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan import traffic
from maxlike.plan.layouts import Shares
from maxlike.plan.trace import trace
from maxlike.program import Program

DEVICES = 8
UNOPTIMISED = "--xla_backend_optimization_level=0"  # nothing is run, and what is sent does not depend on it
LAYOUTS = {
    "data": "{'data': 8}",
    "fsdp": "{'fsdp': 8}",
    "hsdp": "{'data': 2, 'fsdp': 4}",
    "tensor": "{'tensor': 4}",
    "fsdp x tensor": "{'fsdp': 4, 'tensor': 2}",
    "data x fsdp x tensor": "{'data': 2, 'fsdp': 2, 'tensor': 2}",
    "fsdp x context": "{'fsdp': 4, 'context': 2}",
    "context": "{'context': 4}",
}
SHAPE = (
    "vocab = 2048",
    "dim = 256",
    "depth = 4",
    "heads = 8",
    "width = 768",
    "experiment.Experiment.batch_size = 16",
    "experiment.Experiment.sequence_length = 256",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "stack.Stack.scan = True",
)
SMALL = 0.005  # of all bytes: gradients of gains, norms of gradients, metrics


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Compiles one step of the dense family for each layout, on eight devices, simulated where there are fewer. Nothing
    is run and nothing varies: the experiment, repeats and steps say nothing here."""
    if jax.device_count() < DEVICES:
        return _simulated(experiment, repeats, steps)
    quantities, details = [], {}
    for name, shape in LAYOUTS.items():
        bindings = (*SHAPE, f"sharding.Mesh.shape = {shape}")
        made = config.load("families/transformer", bindings=bindings)
        layout = made.mesh.open()
        platform = layout.mesh.devices.flat[0].platform
        program = Program.of(made, layout)
        text = program.lower_step(random_batch(made, made.bare().vocab)).compile().as_text()
        found = by_axis(collectives(text, layout.mesh))
        formula = by_axis(traffic.predict(made, Shares(made, layout), trace(made, platform), platform, "none"))
        total = sum(found.values())
        worst = 0.0
        for key in {*found, *formula}:
            sent, said = found.get(key, 0), formula.get(key, 0)
            if max(sent, said) > SMALL * total:
                worst = max(worst, abs(sent / said - 1) if said else math.inf)
                details[f"{name}: {key[0]} over {' x '.join(key[1])}"] = {"bytes": sent, "formula": said}
        quantities.append(Quantity(f"{name}: largest departure from the formula", "of the formula", [worst], "<= 0.05"))
    return Result("collectives", device_word(), quantities, details)


def _simulated(experiment: Experiment, repeats: int, steps: int) -> Result:
    """The same command in a process with eight simulated CPU devices."""
    name = experiment.config.name if experiment.config else "quickstart"
    flags = (os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}", UNOPTIMISED)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    with tempfile.TemporaryDirectory() as folder:
        command = ["--experiment", name, "--job", "bench", "--name", "collectives", "--out", folder]
        command += ["--repeats", str(repeats), "--steps", str(steps)]
        done = subprocess.run(
            [sys.executable, "-m", "launch", *command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"--name collectives ended with code {done.returncode}: {done.stderr[-2000:]}")
        (path,) = pathlib.Path(folder).glob("records/*.json")
        said = json.loads(path.read_text())
    kept = ("name", "unit", "values", "goal")
    quantities = [Quantity(**{key: quantity[key] for key in kept}) for quantity in said["quantities"]]
    return Result("collectives", "cpu", quantities, said["details"])
