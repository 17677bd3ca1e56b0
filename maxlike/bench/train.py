"""Tokens a second and MFU of an experiment's compiled step on this machine's devices."""

import statistics

import jax

from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word, step_seconds
from maxlike.experiment import Experiment
from maxlike.mfu import CONVENTION, mfu

# What the project promises on one H100- or H200-class GPU in bfloat16.
GOALS = {"gpt2_124m": ">= 380000", "llama_1b": ">= 42000"}


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Every step is waited for, on tokens that lie ready: what the device can do, without loader and loop."""
    seconds = step_seconds(experiment, repeats * steps)
    device, devices = jax.devices()[0], experiment.mesh.open().mesh.size
    name = experiment.config.name if experiment.config else "experiment"
    tokens = experiment.clock.tokens_per_step
    flops = experiment.bare().flops_per_token(experiment.sequence_length)
    goal = GOALS.get(name, "") if device.platform == "gpu" and devices == 1 else ""
    rates = [tokens / statistics.median(seconds[i * steps : (i + 1) * steps]) for i in range(repeats)]
    quantities = [
        Quantity("tokens a second", "tokens/s", rates, goal),
        Quantity("step", "s", seconds),
    ]
    shares = [mfu(rate, flops, device.device_kind, devices) for rate in rates]
    if None not in shares:
        quantities.append(Quantity("MFU", "of peak", shares))
    memory = device.memory_stats() or {}
    details = {
        "device": device.device_kind,
        "devices": devices,
        "compute_dtype": experiment.step.compute_dtype,
        "batch_tokens": tokens,
        "flops_per_token": flops,
        "mfu_convention": CONVENTION,
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
    }
    return Result(f"train_{name.replace('/', '_')}", device_word(), quantities, details)
