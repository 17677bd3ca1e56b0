"""A comparison at the paper's scale: the command, and what the plan says that it costs. Formula alone, no device."""

import pathlib
import shlex
from typing import Any

from maxlike import config, mfu
from maxlike.compare.comparison import Comparison
from maxlike.console import duration
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.plan import targets
from maxlike.plan.planned import Plan, analytic
from maxlike.plan.trace import Trace, trace

COUNTS = tuple(2**n for n in range(13))  # devices that are tried, the fewest first


def at_scales(comparison: Comparison) -> dict[str, Any]:
    """Name of the scale -> its command, and by arm what one run takes; `why` where that cannot be said."""
    return {
        scale: {"command": _command(comparison, scale, overlay)} | _estimate(comparison, scale, overlay)
        for scale, overlay in sorted(comparison.scales.items())
    }


def _command(comparison: Comparison, scale: str, overlay: str) -> str:
    """In a directory of its own: the default one may hold the runs of another size, which are never mixed."""
    name = "NAME" if comparison.config is None else comparison.config.name
    run = f"{pathlib.PurePath(name).stem if name.endswith('.gin') else name}-{scale}"
    words = ["--experiment", name, "--overlay", overlay, "--run_dir", f"runs/{run}"]
    return shlex.join(["python", "-m", "launch", *words])


def _estimate(comparison: Comparison, name: str, overlay: str) -> dict[str, Any]:
    known = {device.name for device in mfu.DEVICES}
    if name not in known:
        return {"why": f"the plan knows no device {name!r}"}
    try:
        arms = {
            arm: config.load(experiment, overlays=(overlay,), unused="keep")
            for arm, experiment in comparison.experiments.items()
        }
        platform = next(device.platform for device in mfu.DEVICES if device.name == name)
        traced = {arm: trace(experiment, platform) for arm, experiment in arms.items()}
        plans = _fewest(name, arms, traced)
    except UserError as refused:
        return {"why": str(refused)}
    rows = {arm: _row(plan, arms[arm]) for arm, plan in plans.items()}
    dollars = [row["dollars"] for row in rows.values()]
    return {
        "device": name,
        "devices": next(iter(plans.values())).devices,
        "arms": rows,
        "seeds": comparison.seeds,
        "seconds": comparison.seeds * sum(row["seconds"] for row in rows.values()),
        "dollars": None if None in dollars else comparison.seeds * sum(dollars),
    }


def _fewest(name: str, arms: dict[str, Experiment], traced: dict[str, Trace]) -> dict[str, Plan]:
    """A plan for each arm on the fewest devices that hold all of them. Raises UserError where no number does."""
    small = refused = None
    for count in COUNTS:
        target = targets.find(None, name, count)
        plans = {}
        try:
            for arm, experiment in arms.items():
                plans[arm] = analytic(experiment, target, traced[arm])
                if not plans[arm].fits:
                    small = f"{arm} does not fit on {count} x {name}, and its mesh takes no more"
                    break
            else:
                return plans
        except UserError as error:
            refused = refused or error
    raise UserError(small) if small else refused


def _row(plan: Plan, experiment: Experiment) -> dict[str, Any]:
    seconds = experiment.steps * plan.time.step
    price = plan.target.device.price
    return {
        "parameters": sum(weight.size for weight in plan.shares.weights),
        "tokens": experiment.steps * plan.tokens,
        "seconds": seconds,
        "dollars": None if price is None else seconds / 3600 * plan.devices * price,
    }


def words(scale: dict[str, Any]) -> str:
    """An estimate in a sentence."""
    if "why" in scale:
        return f"No estimate: {scale['why']}."
    cost = "" if scale["dollars"] is None else f", {scale['dollars']:,.0f} dollars at list price"
    return (
        f"All arms, {scale['seeds']} seeds each, one after the other: about {duration(max(1, scale['seconds']))} on "
        f"{scale['devices']} x {scale['device']}{cost}. By formula alone, nothing was compiled or run; "
        "validation and starting are not in it."
    )
