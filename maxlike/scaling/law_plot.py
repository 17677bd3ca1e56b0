"""The picture of a law: its points, its curve and the band of its interval, on logarithmic axes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from maxlike.report.curves import FAINT, INK
from maxlike.scaling.law import Law

CURVES = 8  # settings of the other variables that get a curve


def draw(law: Law, points: Mapping[str, Sequence[float]], y: str, at: Sequence[Mapping[str, float]] = ()) -> bytes:
    """PNG of y over the law's first variable, a curve for each setting of the others (the lowest, the highest and some
    between, where there are many). points: {variable: values, 'y': values}. at: predicted points; the axis reaches
    them, and what lies outside of the fitted range is dashed."""
    first, *others = law.form.variables
    settings = sorted({tuple(row) for row in zip(*(points[name] for name in others))}) if others else [()]
    settings += [tuple(place[name] for name in others) for place in at]
    settings = list(dict.fromkeys(settings))
    chosen = sorted({round(i) for i in np.linspace(0, len(settings) - 1, min(CURVES, len(settings)))})
    figure = Figure(figsize=(7.2, 4.6), dpi=140, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0.0, 0.8, max(len(chosen), 2)))
    ends = [*law.ranges[first], *(place[first] for place in at)]
    x = np.geomspace(min(ends), max(ends), 300)
    for index, colour in zip(chosen, colours):
        setting = settings[index]
        label = ", ".join(f"{name} {value:.3g}" for name, value in zip(others, setting))
        _curve(axes, law, x, setting, label, colour)
        rows = [i for i in range(len(points["y"])) if tuple(points[name][i] for name in others) == setting]
        axes.plot([points[first][i] for i in rows], [points["y"][i] for i in rows], "o", color=colour, markersize=4)
    for place in at:
        answer = law.predict(place)
        error = [[answer.value - answer.low], [answer.high - answer.value]]
        axes.errorbar([place[first]], [answer.value], error, marker="D", color="#D55E00", capsize=3, zorder=4)
    _dress(axes, law, y)
    if others:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _curve(axes, law: Law, x: np.ndarray, setting: tuple[float, ...], label: str, colour) -> None:
    first, *others = law.form.variables
    rows = np.stack([x, *(np.full_like(x, value) for value in setting)], 1)
    low, value, high = np.exp(law.curve(rows))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    inside = (x >= law.ranges[first][0] * (1 - 1e-9)) & (x <= law.ranges[first][1] * (1 + 1e-9))
    ranges = [law.ranges[name] for name in others]
    known = all(low <= value <= high for (low, high), value in zip(ranges, setting))
    axes.plot(x, value, color=colour, linewidth=1.2, linestyle="--")
    if known:
        axes.plot(x[inside], value[inside], color=colour, linewidth=1.8, label=label)
    else:
        axes.plot([], [], color=colour, linewidth=1.2, linestyle="--", label=f"{label} (extrapolated)")


def _dress(axes, law: Law, y: str) -> None:
    values = {name: f"{interval.value:.3g}" for name, interval in law.parameters.items()}
    axes.set_title(f"{y}{str(law.form)[1:]}", loc="left", color=INK, fontsize=11, fontweight="bold")
    words = ", ".join(f"{name} = {value}" for name, value in values.items())
    axes.set_xlabel(f"{law.form.variables[0]}\n{words};  band: 95 %", color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    low, high = axes.get_ylim()
    if high < 30 * low:  # few or none of the powers of ten are on the axis
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8) if high > 2 * low else "all"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors="#555555", labelsize=9)
