"""`--job plan`: memory, time and cost of an experiment on hardware, before any device is held."""

import json
import pathlib
from typing import Any

from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan import advice, ranking, report, targets
from maxlike.plan.planned import analytic, compile_plan
from maxlike.plan.trace import trace


def plan(
    experiment: Experiment,
    run_dir: pathlib.Path | None = None,
    *,
    topology: str | None = None,
    hardware: str | None = None,
    devices: int = 0,
    slices: int = 1,
    search: bool = False,
    top: int = 10,
    tokens: float = 1e12,
    price: float | None = None,
    out: str = "",
) -> dict[str, Any]:
    """What a run needs and how fast it can be: memory, FLOPs, collectives, time, cost. Holds no device.

    topology: compile the step ahead of time for v4, v5e, v5p or v6e slices such as v5e:4x4 (libtpu, no TPU needed),
    cpu:8 (simulated devices) or local (this machine's). hardware, devices: estimate by formula alone, such as h200 and
    256. slices: of TPUs, so many devices each, with the data-center network between them. search: also rank meshes
    (pipelines and rows cut along their length among them), remat and micro-batches by predicted tokens/s; top: so many
    of them. tokens: of the whole run, for its cost. price: dollars a device-hour, None for the list price where one is
    known. out: where to write the plan as JSON; default: plan.json in the run's directory. A README.md there with marks
    gets its table.
    """
    if tokens <= 0 or top < 1 or (price is not None and price < 0):
        raise UserError(f"--tokens {tokens} and --top {top} must be positive, and --price {price} not negative")
    target = targets.find(topology, hardware, devices, slices)
    if search:
        ranking.check(target)  # refused before anything is compiled
    ranked, nothing = [], None
    try:
        ranked = ranking.rank(experiment, target, top) if search else []
    except UserError as refusal:  # what was asked about still gets its plan, its verdict and the changes that help it
        nothing = refusal
    try:
        made = analytic(experiment, target, trace(experiment, target.platform))
    except UserError as refusal:  # a search may be for a mesh that divides
        if not ranked:
            raise
        made = ranked[0].plan
        print(f"the experiment's own mesh cannot be: {refusal}\nThis is the plan of the first that was found.")
    if target.devices is not None:
        made = compile_plan(made)
    changes = advice.cheapest(made) if made.fits is False else []
    price = price if price is not None or target.device is None else target.device.price
    content = report.content(made, changes, ranked, tokens, price)
    path = pathlib.Path(out) if out else pathlib.Path(run_dir or ".") / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    report.update(path.parent / "README.md")
    report.show(content)
    print(f"written to {path}")
    if nothing is not None:
        raise nothing
    return content
