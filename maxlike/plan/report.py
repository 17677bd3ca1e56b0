"""A plan as plain values, for JSON, and those as tables for people."""

import importlib.metadata
import json
import pathlib
import shlex
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from maxlike.collectives import by_axis
from maxlike.console import duration, quantity
from maxlike.mfu import CONVENTION


def content(plan: Any, changes: list, ranked: list, tokens: float, price: float | None) -> dict[str, Any]:
    """Everything that a plan says, as plain values. Bytes and FLOPs are of one device and one step where not said."""
    experiment, target, time, compiled = plan.experiment, plan.target, plan.time, plan.compiled
    params = sum(w.size for w in plan.shares.weights)
    return {
        "experiment": experiment.config.name if experiment.config else "",
        "target": target.word,
        "made_by": _made_by(plan),
        "command": shlex.join(["python", "-m", "launch", *sys.argv[1:]]),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "devices": plan.devices,
        "devices_there": target.count,
        "mesh": dict(plan.shares.sizes),
        "remat": plan.remat,
        "micro_batches": experiment.step.micro_batches,
        "batch_size": experiment.batch_size,
        "sequence_length": experiment.sequence_length,
        "compute_dtype": experiment.step.compute_dtype,
        "parameters": params,
        "active_parameters": plan.trace.active,
        "memory": _memory(plan),
        "fits": plan.fits,
        "verdict": verdict(plan),
        "flops_per_token": plan.trace.flops_per_token,
        "collectives": [
            {"kind": kind, "axes": list(axes), "bytes": sent}
            for (kind, axes), sent in by_axis(plan.collectives).items()
        ],
        "time": None if time is None else _time(plan),
        "run": None if time is None else _run(plan, tokens, price),
        "kernels": [] if compiled is None else [list(kernel) for kernel in compiled.kernels],
        "seconds_to_lower_and_compile": None if compiled is None else [round(s, 1) for s in compiled.seconds],
        "changes": [change.plain() for change in changes],
        "search": [candidate.plain() for candidate in ranked],
    }


def _made_by(plan: Any) -> str:
    if plan.compiled is not None:
        return "the compiler: memory and collectives; formula: time"
    if plan.refused is not None:
        return "the compiler, which gave up for lack of memory; formula: the rest"
    return "formula alone, nothing was compiled"


def _memory(plan: Any) -> dict[str, Any]:
    predicted = plan.memory
    told = {
        "parameters": predicted.parameters,
        "optimizer": predicted.optimizer,
        "other_state": predicted.other,
        "batch": predicted.batch,
        "predicted": {
            "gradients": round(predicted.gradients),
            "compute_copy": round(predicted.copy),
            "kept_activations": round(predicted.kept),
            "working": round(predicted.working),
            "temporary": round(predicted.temporary),
            "peak": round(predicted.peak),
        },
        "peak": round(plan.peak),
        "limit": None if plan.limit is None else round(plan.limit),
    }
    if plan.compiled is not None:
        names = ("arguments", "outputs", "aliased", "temporary", "peak")
        told["compiled"] = {name: getattr(plan.compiled, name) for name in names}
    return told


def _time(plan: Any) -> dict[str, Any]:
    time = plan.time
    return {
        "flops": time.flops,
        "memory_bytes": time.memory_bytes,
        "compute_seconds": time.compute,
        "memory_seconds": time.memory,
        "network_seconds": time.network,
        "network_seconds_not_hidden": time.exposed,
        "pipeline_bubble": time.bubble,
        "binds": time.binds,
        "step_seconds": time.step,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "mfu_convention": CONVENTION,
    }


def _run(plan: Any, tokens: float, price: float | None) -> dict[str, Any]:
    seconds = tokens / plan.tokens_per_second
    dollars = None if price is None else seconds / 3600 * plan.devices * price
    return {
        "tokens": tokens,
        "days": seconds / 86400,
        "price_of_a_device_hour": price,
        "dollars": dollars,
    }


def verdict(plan: Any) -> str:
    """One line: whether it fits."""
    peak = quantity(plan.peak, "B")
    if plan.fits is None:
        return f"needs {peak} a device; how much {plan.target.word} has is not known"
    limit = quantity(plan.limit, "B")
    if plan.fits:
        return f"fits: {peak} of {limit} a device"
    if plan.refused is not None and plan.refused.needed is None:
        return f"does not fit {limit} a device: {plan.refused}"
    return f"does not fit: {peak} of {limit} a device"


BEGIN, END = "<!-- plans -->", "<!-- end of plans -->"


def table(folder: pathlib.Path) -> str:
    """All plans in a folder as a Markdown table."""
    lines = [
        "| experiment | target | mesh | remat, micro-batches | made by | peak a device | fits | step | tokens/s "
        "| MFU | binds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text())
        mesh = " x ".join(f"{axis} {size}" for axis, size in told["mesh"].items())
        memory, time = told["memory"], told["time"]
        verdict = {True: "yes", False: "**no**", None: ""}[told["fits"]]
        speed = ["", "", "", ""]
        if time is not None:
            speed = [
                f"{time['step_seconds']:.3g} s",
                quantity(time["tokens_per_second"]),
                f"{100 * time['mfu']:.0f} %",
                time["binds"],
            ]
        made = "compiler" if "compiled" in memory else told["made_by"].split(",")[0]
        cells = [told["experiment"], told["target"], mesh, f"{told['remat']}, {told['micro_batches']}", made]
        cells += [f"{quantity(memory['peak'], 'B')} of {quantity(memory['limit'] or 0, 'B')}", verdict, *speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update(readme: pathlib.Path) -> None:
    """Puts the table of the plans beside it into a README that has the two marks; leaves any other alone."""
    text = readme.read_text() if readme.is_file() else ""
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{table(readme.parent)}\n{END}{rest.split(END)[1]}")


def show(told: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables."""
    console = Console(highlight=False) if console is None else console
    if not console.is_terminal:
        console.width = 100
    console.print(_overview(told))
    if told["collectives"]:
        console.print(_collectives(told["collectives"]))
    console.print(told["verdict"], soft_wrap=True)
    for change in told["changes"]:
        console.print(
            f"  {change['change']}: saves {quantity(change['saves'], 'B')} a device, step time x "
            f"{change['slower']:.2f}{', then it fits' if change['fits'] else ''}\n      {change['how']}",
            soft_wrap=True,
        )
    if told["changes"] and not any(change["fits"] for change in told["changes"]):
        console.print("  none of these fits alone: put several on, take more devices, or let `--search` look")
    if told["search"]:
        console.print(_ranking(told["search"]))
        console.print(f"to run the first: {told['search'][0]['how']}", soft_wrap=True)


def _overview(told: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    memory, time, run = told["memory"], told["time"], told["run"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in told["mesh"].items() if size > 1) or "one device"
    table.add_row("plan", f"{told['experiment']} on {told['target']} ({told['made_by']})")
    idle = told["devices_there"] - told["devices"]
    if idle:
        mesh += f", {idle} of {told['devices_there']} devices idle (`--overlay mesh/fsdp` uses all)"
    table.add_row("mesh", f"{mesh}; remat {told['remat']}, micro-batches {told['micro_batches']}")
    tokens = told["batch_size"] * told["sequence_length"]
    table.add_row("batch", f"{quantity(tokens)} tokens a step")
    table.add_row(
        "parameters",
        f"{quantity(told['parameters'])}, {quantity(told['active_parameters'])} active for a token, "
        f"{quantity(told['flops_per_token'], 'FLOPs')} a token",
    )
    table.add_row(
        "state",
        f"{quantity(memory['parameters'], 'B')} parameters, {quantity(memory['optimizer'], 'B')} optimizer, "
        f"{quantity(memory['other_state'] + memory['batch'], 'B')} rest, a device",
    )
    table.add_row("temporary", _temporary(memory))
    if time is not None:
        table.add_row(
            "a step",
            f"{quantity(time['flops'], 'FLOPs')}, {quantity(time['memory_bytes'], 'B')} of memory traffic a device",
        )
        table.add_row(
            "time",
            f"compute {_seconds(time['compute_seconds'])}, memory {_seconds(time['memory_seconds'])}, network "
            f"{_seconds(time['network_seconds'])} ({_seconds(time['network_seconds_not_hidden'])} not hidden): "
            f"{time['binds']} binds; pipeline bubble {100 * time['pipeline_bubble']:.1f} %",
        )
        table.add_row(
            "speed",
            f"{_seconds(time['step_seconds'])} a step, {quantity(time['tokens_per_second'])} tokens/s, "
            f"MFU {100 * time['mfu']:.1f} % ({time['mfu_convention']})",
        )
        cost = (
            "no list price known: give `--price DOLLARS` a device-hour for the cost"
            if run["dollars"] is None
            else f"${run['dollars']:,.0f}"
        )
        table.add_row("run", f"{quantity(run['tokens'])} tokens: {duration(run['days'] * 86400)}, {cost}")
    for index, (operation, implementation, reason) in enumerate(told["kernels"]):
        table.add_row("" if index else "kernels", f"{operation}: {implementation} ({reason})")
    return table


def _seconds(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.2g} s"


def _temporary(memory: dict[str, Any]) -> str:
    parts = memory["predicted"]
    words = ", ".join(
        f"{quantity(parts[name], 'B')} {name.replace('_', ' ')}"
        for name in ("gradients", "compute_copy", "kept_activations", "working")
    )
    compiled = memory.get("compiled")
    said = "" if compiled is None else f"; the compiler says {quantity(compiled['temporary'], 'B')}"
    return f"{quantity(parts['temporary'], 'B')} predicted ({words}){said}"


def _collectives(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="sent by a device in a step", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("collective", "over", "bytes"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        table.add_row(row["kind"], " x ".join(row["axes"]), quantity(row["bytes"], "B"))
    return table


def _ranking(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="meshes by predicted tokens/s (micro: the step's, x those of a pipeline)",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in ("mesh", "remat", "micro", "tokens/s", "MFU", "peak", "binds", "step time if one thing changes"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items()),
            row["remat"],
            str(row["micro_batches"]) + (f" x {piped}" if (piped := row["pipeline_micro_batches"]) else ""),
            quantity(row["tokens_per_second"]),
            f"{100 * row['mfu']:.1f} %",
            quantity(row["peak"], "B"),
            row["binds"],
            "; ".join(f"{knob}: {100 * change:+.0f}%" for knob, change in _largest(row["sensitivity"])),
        )
    return table


def _largest(sensitivity: dict[str, float], count: int = 3) -> list[tuple[str, float]]:
    """What changes most; the JSON has all of it."""
    return sorted(sensitivity.items(), key=lambda item: -abs(item[1]))[:count]
