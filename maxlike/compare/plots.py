"""The pictures of a comparison as PNG images: curves over FLOPs, a metric by arm, and the rule's intervals."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from maxlike.compare import metrics
from maxlike.compare.metrics import Metrics
from maxlike.report.curves import FAINT, INK

GREY = "#666666"
# Okabe and Ito's colours, which people who are colour-blind can tell apart; the yellow one is too pale on white. The
# baseline is black. From the eighth arm on, they begin again with other lines and marks.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C4A2F")
LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
MARKS = ("o", "s", "^")
OUTCOMES = {"holds": "#0072B2", "does not hold": "#D55E00", "cannot tell": "#666666"}
DRAWN = 400  # points of a curve
SHOWN_FROM = 0.15  # of a run: what lies higher than the curves there is cut off, the first descent would flatten all
GAPS_FROM = 0.3  # of a run: the axis of the gaps between curves fits what comes later
LOG_FROM = 20.0  # a largest value so many times the smallest is drawn on a logarithmic axis


def styles(arms: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Arm -> colour, line and mark, the same in every picture."""
    found, others = {}, [arm for arm in arms if arm != baseline]
    for i, arm in enumerate(others):
        lap = (i // len(COLOURS)) % len(LINES)
        found[arm] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[lap], "marker": MARKS[lap]}
    return {baseline: {"color": "#111111", "linestyle": "-", "marker": "D"}} | found


def curves(measured: Metrics, key: str) -> bytes | None:
    """Smoothed training curves of KEY over training FLOPs: the mean over seeds, and the range of all seeds as a band.
    A run that diverged is a thin line to where it ended. None where nothing was written."""
    if not any(run.has(metrics.Name("train", key)) for run in measured.runs.values()):
        return None
    figure = Figure(figsize=(8.2, 6.2), dpi=140, layout="constrained")
    _draw_pair(figure, measured, key)
    return _png(figure)


def _draw_pair(figure, measured: Metrics, key: str) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    draw_curves(top, measured, key)
    draw_gaps(bottom, measured, key)
    for axes in (top, bottom):
        axes.set_xlim(left=0)


def draw_curves(axes, measured: Metrics, key: str) -> None:
    ends, shown = {}, []
    looks = styles(measured.arms, measured.baseline)
    for arm in measured.arms:
        look = looks[arm] | {"marker": ""}
        for run in measured.of(arm):
            if run.diverged is not None:
                x, y = run.curve(key, measured.window)
                axes.plot(x, y, linewidth=0.8, **look)
                axes.plot(x[-1:], y[-1:], marker="x", color=look["color"], markersize=8, markeredgewidth=2)
        x, y_SX = _common(measured, arm, key)
        if not len(x):
            axes.plot([], [], linewidth=1.7, label=f"{arm}  diverged", **look)
            continue
        mean = y_SX.mean(0)
        axes.fill_between(x, y_SX.min(0), y_SX.max(0), color=look["color"], alpha=0.16, linewidth=0)
        (line,) = axes.plot(x, mean, linewidth=1.7, label=f"{arm}  {mean[-1]:.3f}", **look)
        ends[line] = mean[-1]
        shown += [mean.min(), y_SX.min(), mean[int(SHOWN_FROM * len(mean))]]
    axes.set_title(f"Train {metrics.quantity(key)}", loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_ylabel(f"mean of {measured.window} steps", color=INK)
    if shown and np.ptp(shown) > 0:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    # The arms in the order in which they end, so that the legend reads like the picture.
    lines = axes.get_legend_handles_labels()[0]
    lines.sort(key=lambda line: -ends.get(line, np.inf))
    axes.legend(
        handles=lines, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK, fontsize=9,
        title="arm, at its end", title_fontsize=9, alignment="left",
    )  # fmt: skip
    _dress(axes)


def draw_gaps(axes, measured: Metrics, key: str) -> None:
    """The same curves less the baseline's of the same seed at the same FLOPs: mean over seeds, and range."""
    looks, shown = styles(measured.arms, measured.baseline), []
    axes.axhline(0, color=looks[measured.baseline]["color"], linewidth=1.4)
    base = {run.seed: run.curve(key, measured.window) for run in measured.of(measured.baseline) if not run.diverged}
    for arm in measured.arms:
        pairs = [(run.curve(key, measured.window), base[run.seed]) for run in measured.of(arm)
                 if arm != measured.baseline and run.seed in base and run.diverged is None]  # fmt: skip
        pairs = [(ours, theirs) for ours, theirs in pairs if len(ours[0]) and len(theirs[0])]
        first = max((max(ours[0][0], theirs[0][0]) for ours, theirs in pairs), default=0.0)
        last = min((min(ours[0][-1], theirs[0][-1]) for ours, theirs in pairs), default=0.0)
        if last <= first:
            continue
        x = np.linspace(first, last, DRAWN)
        gap_SX = np.stack([np.interp(x, *ours) - np.interp(x, *theirs) for ours, theirs in pairs])
        look = looks[arm] | {"marker": ""}
        axes.fill_between(x, gap_SX.min(0), gap_SX.max(0), color=look["color"], alpha=0.16, linewidth=0)
        axes.plot(x, gap_SX.mean(0), linewidth=1.5, **look)
        late = gap_SX[:, x >= GAPS_FROM * last]
        shown += [late.min(), late.max()] if late.size else []
    low, high = min([0.0, *shown]), max([0.0, *shown])
    if high > low:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes.set_xlabel("training FLOPs", color=INK)
    axes.set_ylabel(f"less {measured.baseline}", color=INK)
    axes.xaxis.set_major_formatter(EngFormatter())
    _dress(axes)


def _common(measured: Metrics, arm: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(FLOPs [X], smoothed values [seeds, X]) of an arm's runs that did not diverge, on common points."""
    found = [run.curve(key, measured.window) for run in measured.of(arm) if run.diverged is None]
    found = [(x, y) for x, y in found if len(x)]
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    x = np.linspace(max(x[0] for x, _ in found), min(x[-1] for x, _ in found), DRAWN)
    return x, np.stack([np.interp(x, *curve) for curve in found])


def points(measured: Metrics, metric: str) -> bytes | None:
    """A metric by arm: each seed a point, their mean a stroke. None where no arm has it."""
    values = {arm: measured.values(metric, arm) for arm in measured.arms}
    values = {arm: found for arm, found in values.items() if found}
    if not values:
        return None
    figure = Figure(figsize=(8.2, 1.3 + 0.36 * len(values)), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    looks = styles(measured.arms, measured.baseline)
    rows = {arm: len(values) - 1 - i for i, arm in enumerate(values)}
    known = {arm: [v.low for v in found.values() if v.known] for arm, found in values.items()}
    for arm, row in rows.items():
        look = looks[arm]
        axes.axhline(row, color=FAINT, linewidth=0.7, zorder=0)
        spread = np.linspace(-0.16, 0.16, len(known[arm])) if len(known[arm]) > 1 else [0.0]
        marks = {"marker": look["marker"], "linestyle": "", "color": look["color"]}
        axes.plot(known[arm], row + np.asarray(spread[: len(known[arm])]), markersize=5, alpha=0.75, **marks)
        if known[arm]:
            axes.plot([np.mean(known[arm])] * 2, [row - 0.33, row + 0.33], color=look["color"], linewidth=2.4)
        bounds = [v.high for v in values[arm].values() if not v.known and np.isfinite(v.high)]
        axes.plot(bounds, [row] * len(bounds), marker="<", linestyle="", color=look["color"], fillstyle="none")
        if unknown := _unknown(list(values[arm].values())):
            axes.annotate(unknown, (1.01, row), xycoords=("axes fraction", "data"), ha="left", va="center",
                          color=GREY, fontsize=9)  # fmt: skip
    if known.get(measured.baseline):
        axes.axvline(np.mean(known[measured.baseline]), color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    everything = [x for found in known.values() for x in found]
    if everything and min(everything) > 0 and max(everything) > LOG_FROM * min(everything):
        _log_x(axes)
    if everything and np.ptp(everything) == 0:
        axes.set_xlim(everything[0] - 1, everything[0] + 1)
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_title(_title(metric), loc="left", color=INK, fontsize=12, fontweight="bold")
    _dress(axes, grid="x")
    return _png(figure)


def _title(metric: str) -> str:
    words = metrics.described(metric)
    return textwrap.fill(words[0].upper() + words[1:], 80)


def _unknown(values: Sequence[metrics.Value]) -> str:
    """What of an arm cannot be drawn as points."""
    bounds = sum(not v.known and np.isfinite(v.high) for v in values)
    infinite = sum(v.low == np.inf for v in values)
    words = [f"not reached in {bounds} of {len(values)}"] * bool(bounds)
    words += [f"diverged in {infinite} of {len(values)}"] * bool(infinite)
    words += ["unknown"] * any(v.low != v.high and not np.isfinite(v.high) for v in values)
    return ", ".join(words)


def rule(criteria: Sequence[dict[str, Any]]) -> bytes | None:
    """What each criterion of verdict.json tested: seeds, mean and 95 % interval against the claim's side."""
    if not criteria:
        return None
    figure = Figure(figsize=(8.2, 0.2 + 1.12 * len(criteria)), dpi=140, layout="constrained")
    for axes, one in zip(np.atleast_1d(figure.subplots(len(criteria), 1)), criteria, strict=True):
        draw_criterion(axes, one)
    return _png(figure)


def verdict(content: dict[str, Any], measured: Metrics) -> bytes | None:
    """The picture of the whole: the loss over FLOPs beside the rule's intervals. None where there are neither."""
    has_loss = any(run.has(metrics.Name("train", "loss")) for run in measured.runs.values())
    if not (has_loss and content["rule"]):
        return None
    figure = Figure(figsize=(14.4, max(5.6, 0.9 + 0.95 * len(content["rule"]))), dpi=120, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.03)
    _draw_pair(left, measured, "loss")
    for axes, one in zip(np.atleast_1d(right.subplots(len(content["rule"]), 1)), content["rule"], strict=True):
        draw_criterion(axes, one)
    figure.suptitle(f"{content['title']}: {content['verdict']}", x=0.01, ha="left", fontweight="bold",
                    color=OUTCOMES[content["verdict"]])  # fmt: skip
    return _png(figure)


def draw_criterion(axes, one: dict[str, Any]) -> None:
    colour = OUTCOMES[one["outcome"]]
    boundary, (low, high) = one["boundary"], one["interval"]
    seeds = [x for value in one["values"].values() for x in (value if isinstance(value, list) else [value])]
    there = [x for x in (*seeds, one["mean"], boundary) if x is not None]
    if one["log"]:
        _log_x(axes)
    to, back = (np.log, np.exp) if one["log"] else (np.asarray, np.asarray)
    # What is drawn: the boundary, every seed, and as much of the interval as does not dwarf them.
    first, last = to(min(there)), to(max(there))
    width = (last - first) or abs(first) or 1.0
    ends = [to(x) for x in (low, high) if x is not None]
    first = max(min([first, *ends]), first - 2 * width) - 0.12 * width
    last = min(max([last, *ends]), last + 2 * width) + 0.12 * width
    axes.set_xlim(back(first), back(last))
    side = (back(first), boundary) if one["side"] == "below" else (boundary, back(last))
    axes.axvspan(*side, color="#56B4E9", alpha=0.16, linewidth=0)
    axes.axvline(boundary, color=INK, linewidth=1)
    left, right = (low if low is not None else back(first), high if high is not None else back(last))
    axes.plot([left, right], [0, 0], color=colour, linewidth=4, alpha=0.45, solid_capstyle="butt", clip_on=True)
    for x in seeds:
        if x is not None:
            axes.plot(x, 0, marker="o", markersize=5, color=colour, alpha=0.8, linestyle="")
    if one["mean"] is not None:
        axes.plot([one["mean"]] * 2, [-0.55, 0.55], color=colour, linewidth=2.4)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.set_title(textwrap.fill(one["sentence"], 70), loc="left", fontsize=10, color=INK)
    axes.set_title(one["outcome"], loc="right", fontsize=10, color=colour, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors="#555555", labelsize=8, which="both")
    if not one["log"]:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _dress(axes, grid: str = "both") -> None:
    axes.grid(color=FAINT, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#555555", labelsize=9, which="both")


def _log_x(axes) -> None:
    """A logarithmic axis with ordinary numbers, between the powers of ten too where it spans few of them."""
    axes.set_xscale("log")

    def between(x: float, _: int) -> str:
        low, high = axes.get_xlim()
        return f"{x:g}" if high < 30 * low and f"{x:e}"[0] in "235" else ""

    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(between))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
