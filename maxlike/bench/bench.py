"""`--job bench`: measure speed and memory; records go to benchmarks/."""

import pathlib
from collections.abc import Callable
from typing import Literal

from maxlike.bench import (
    collectives,
    data,
    decode,
    kernels,
    loop,
    lower,
    moe,
    precision,
    record,
    recurrence,
    start,
    torch_llama,
    train,
    whole,
)
from maxlike.errors import UserError
from maxlike.experiment import Experiment

BENCHMARKS: dict[str, Callable[[Experiment, int, int], record.Result]] = {
    "torch_llama": torch_llama.measure,
    "loop": loop.measure,
    "start": start.measure,
    "data": data.measure,
    "train": train.measure,
    "whole": whole.measure,
    "decode": decode.measure,
    "moe": moe.measure,
    "recurrence": recurrence.measure,
    "kernels": kernels.measure,
    "precision": precision.measure,
    "precision_loss": precision.measure_loss,
    "collectives": collectives.measure,
    "lower": lower.measure,
}


def bench(
    experiment: Experiment,
    run_dir: pathlib.Path | None = None,
    *,
    name: Literal[
        "all",
        "torch_llama",
        "loop",
        "start",
        "data",
        "train",
        "whole",
        "decode",
        "moe",
        "recurrence",
        "kernels",
        "precision",
        "precision_loss",
        "collectives",
        "lower",
    ] = "all",
    repeats: int = 5,
    steps: int = 20,
    out: str = "benchmarks",
) -> list[pathlib.Path]:
    """Measures and writes one record each to OUT/records. Run it on an otherwise idle machine: the load is recorded.

    name: torch_llama (a small Llama against PyTorch), loop (what the training loop adds to the compiled step), start
    (command to first step), data (building layers, reading batches), train (tokens/s and MFU of the experiment), whole
    (the experiment from command to report), decode (a decoding step against the reads of its weights), moe (a mixture
    of experts against a dense model of the same active FLOPs), recurrence (linear mixers against softmax attention, by
    length), kernels (the implementations of every operation that picks one, against each other, by length), precision
    (eight-bit products against bfloat16: tokens/s), precision_loss (the same: what the experiment learns; each of the
    repeats is another seed), collectives (what a compiled step sends on eight devices against the planner's formula, by
    layout), lower (seconds to lower and compile 64 layers), or all of them.
    repeats: processes or passes of each. steps: timed steps in each. out: folder of the records.
    """
    if repeats < 1 or steps < 3:
        raise UserError(f"--repeats {repeats} must be at least 1 and --steps {steps} at least 3")
    paths = []
    for chosen in BENCHMARKS if name == "all" else (name,):
        with record.surroundings() as environment:
            print(f"{chosen}: load {environment['load_before']} on {record.cores()} cores", flush=True)
            result = BENCHMARKS[chosen](experiment, repeats, steps)
        for quantity in result.quantities:
            goal = "" if quantity.met is None else f"   goal {quantity.goal}: {'met' if quantity.met else 'NOT MET'}"
            print(f"  {quantity.name}: {quantity.median:.4g} {quantity.unit}{goal}")
        print(f"  load {environment['load_after']} at the end")
        paths.append(record.write(result, environment, pathlib.Path(out)))
        print(f"  {paths[-1]}", flush=True)
    return paths
