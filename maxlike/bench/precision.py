"""Eight-bit products against bfloat16: tokens a second of an experiment's step, and what the experiment learns."""

import copy
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable

from layers.low_precision import Float8, Int8, missing
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import Steps, device_word
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.train import train

BASE = "bfloat16"
# What the project promises on one GPU that multiplies FP8, of the fastest of the three scalings.
GOALS = {"llama_1b": ">= 1.15"}
# The same in the last validation loss, of every arm.
CLOSE = "<= 0.01"


def arms() -> dict[str, Callable | None]:
    """What is compared: eight bits, emulated where the device has none."""
    eight, integers = missing("Float8") is not None, missing("Int8") is not None
    scalings = ("tensor", "row", "delayed")
    made = {f"float8 {scaling}": Float8(scaling=scaling, emulate=eight) for scaling in scalings}
    return {BASE: None} | made | {"int8 row": Int8(emulate=integers)}


def variant(experiment: Experiment, products: Callable | None, seed: int) -> Experiment:
    """The experiment in bfloat16 with these products."""
    step = copy.copy(experiment.step)
    step.compute_dtype = "bfloat16"
    return dataclasses.replace(experiment, step=step, products=products, seed=seed)


def _name(experiment: Experiment) -> str:
    return experiment.config.name if experiment.config else "experiment"


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` x `steps` steps of each arm, one arm after another: each has the device's memory to itself."""
    tokens, rates, calls = experiment.clock.tokens_per_step, {}, {}
    for name, products in arms().items():
        run = Steps(variant(experiment, products, experiment.seed))
        seconds = [[run() for _ in range(steps)] for _ in range(repeats)]
        run.check()
        rates[name] = [tokens / statistics.median(some) for some in seconds]
        # Without these calls a GPU has multiplied in a wider dtype, whatever the program says.
        calls[name] = run.compiled.as_text().count("__cublas$lt$matmul$f8")
        del run
    base, emulated = statistics.median(rates[BASE]), missing("Float8") is not None
    gains = {name: [rate / base for rate in rates[name]] for name in rates if name != BASE}
    best = max((name for name in gains if "float8" in name), key=lambda name: statistics.median(gains[name]))
    goal = "" if emulated else GOALS.get(_name(experiment), "")
    quantities = [Quantity("tokens/s, fastest float8 / bfloat16", "", gains[best], goal)]
    quantities += [Quantity(f"tokens/s, {name} / bfloat16", "", gain) for name, gain in gains.items()]
    quantities += [Quantity(f"tokens/s, {name}", "tokens/s", rate) for name, rate in rates.items()]
    details = {"emulated": emulated, "fastest": best, "batch_tokens": tokens, "cublas_f8_calls": calls}
    return Result(f"precision_{_name(experiment).replace('/', '_')}", device_word(), quantities, details)


def measure_loss(experiment: Experiment, repeats: int, steps: int) -> Result:
    """Trains every arm to the end of the experiment with `repeats` seeds, the arms paired by seed: the same first
    parameters and batches. `steps` does not matter here."""
    losses: dict[str, list[float]] = {}
    for name, products in arms().items():
        for seed in range(experiment.seed, experiment.seed + repeats):
            with tempfile.TemporaryDirectory() as folder:
                validation = train(variant(experiment, products, seed), pathlib.Path(folder) / "run")
            if "loss" not in validation:
                raise UserError(
                    f"{_name(experiment)} was stopped, or validates nothing: bind hooks.Validate to Experiment.hooks"
                )
            losses.setdefault(name, []).append(validation["loss"])
    quantities = [Quantity("validation loss, bfloat16", "nats", losses[BASE])]
    for name in losses:
        if name != BASE:
            departures = [abs(ours / base - 1) for ours, base in zip(losses[name], losses[BASE])]
            quantities.append(Quantity(f"validation loss, {name}: departure from bfloat16", "", departures, CLOSE))
            quantities.append(Quantity(f"validation loss, {name}", "nats", losses[name]))
    details = {"steps": experiment.steps, "emulated": missing("Float8") is not None}
    return Result(f"precision_loss_{_name(experiment).replace('/', '_')}", device_word(), quantities, details)
