"""The picture of a sweep: the metric over one knob, a line for each setting of the others."""

import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from maxlike.compare import metrics
from maxlike.report.curves import FAINT, INK

LINES = 12  # in the legend
WIDE = 4.0  # a knob whose largest value is so many times the smallest is drawn on a logarithmic axis


def draw(records: list[dict[str, Any]], short: dict[str, str], metric: str) -> bytes:
    """PNG. The axis is the numeric knob with the most values; runs are dots, the mean over seeds is the line, runs that
    diverged are crosses at the top."""
    knobs = list(short)
    axis = max(knobs, key=lambda knob: (_numeric(records, knob), len(_values(records, knob)), -knobs.index(knob)))
    numeric = _numeric(records, axis)
    places = {value: value if numeric else place for place, value in enumerate(_values(records, axis))}
    others = [knob for knob in knobs if knob != axis]
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        lines.setdefault(", ".join(f"{short[knob]} {one['point'][knob]}" for knob in others), []).append(one)
    figure = Figure(figsize=(7.2, 4.4), dpi=140, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0.0, 0.85, max(len(lines), 2)))
    for (label, runs), colour in zip(lines.items(), colours):
        _line(axes, runs, axis, places, metric, label, colour)
    if numeric and min(places) > 0 and max(places) >= WIDE * min(places):
        axes.set_xscale("log")
    if numeric and len(places) <= 10:
        axes.set_xticks(list(places), [f"{place:g}" for place in places])
        axes.set_xticks([], minor=True)
    if not numeric:
        axes.set_xticks(list(places.values()), [str(value) for value in places])
    axes.set_title(metrics.described(metric).capitalize(), loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel(axis, color=INK)
    axes.set_ylabel(metric, color=INK)
    if others and len(lines) <= LINES:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    axes.margins(y=0.12)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors="#555555", labelsize=9)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _line(axes, runs: list[dict], axis: str, places: dict, metric: str, label: str, colour) -> None:
    by_place: dict[float, list[float]] = {}
    for one in runs:
        place, value = places[one["point"][axis]], one["metrics"].get(metric)
        if value is None:
            axes.plot([place], [0.97], marker="x", color=colour, transform=axes.get_xaxis_transform(), linestyle="")
        else:
            by_place.setdefault(place, []).append(value)
    if not by_place:
        return
    x = sorted(by_place)
    mean = [float(np.mean(by_place[place])) for place in x]
    axes.plot(x, mean, color=colour, linewidth=1.6, label=label, marker="o", markersize=4)
    for place, values in by_place.items():
        if len(values) > 1:
            axes.plot([place] * len(values), values, color=colour, marker="o", markersize=3, linestyle="", alpha=0.5)
    if len(x) > 2:
        best = int(np.argmin(mean))
        axes.annotate(
            f"{mean[best]:.3f}", (x[best], mean[best]), (0, -13), textcoords="offset points", ha="center", color=colour,
            fontsize=9,
        )  # fmt: skip


def _values(records: list[dict], knob: str) -> list:
    values = []
    for one in records:
        if one["point"][knob] not in values:
            values.append(one["point"][knob])
    return sorted(values) if _numeric(records, knob) else values


def _numeric(records: list[dict], knob: str) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in (one["point"][knob] for one in records))
