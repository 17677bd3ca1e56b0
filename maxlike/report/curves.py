"""The curves of a run as PNG images."""

import dataclasses
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

from maxlike.report.records import Series, running_mean, series

TRAIN, VALIDATION, INK, FAINT = "#2f6fb5", "#d1652b", "#222222", "#d9d9d9"
DRAWN = 3000  # points of a raw curve; more cannot be seen
WINDOWS = 60  # the smoothed curve averages over 1/60 of the run


@dataclasses.dataclass(frozen=True)
class Curve:
    """One image. name: of the PNG file. key: in metrics.jsonl. label: of the y axis, with its unit. smooth: also draw a
    running mean of the training curve. from_zero: let the y axis begin at zero."""

    name: str
    key: str
    title: str
    label: str
    smooth: bool = True
    from_zero: bool = False


CURVES = (
    Curve("loss", "loss", "Loss", "cross-entropy (nats a token)"),
    Curve("bits_per_byte", "bits_per_byte", "Bits per byte", "bits a byte of text"),
    Curve("throughput", "tokens_per_second", "Throughput", "tokens a second", from_zero=True),
    Curve("learning_rate", "learning_rate", "Learning rate", "learning rate", smooth=False, from_zero=True),
    Curve("gradient_norm", "grad_norm", "Gradient norm", "global norm before clipping", from_zero=True),
)


def draw(curve: Curve, records: list[dict]) -> bytes | None:
    """The PNG image of a curve, or None where the records hold nothing of it."""
    train = series(records, "train", curve.key)
    validation = series(records, "validation", curve.key)
    if not len(train[0]) and not len(validation[0]):
        return None
    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_train(axes, train, curve.smooth)
    if len(validation[0]):
        axes.plot(
            *validation, color=VALIDATION, linewidth=1.4, marker="o", markersize=3.5, label="validation", zorder=3
        )
        end = (validation[0][-1], validation[1][-1])
        axes.annotate(f"{end[1]:.3f}", end, (0, 7), textcoords="offset points", ha="right", color=VALIDATION)
        if len(train[0]):
            axes.legend(frameon=False, labelcolor=INK)
    _limits(axes, np.concatenate([train[1], validation[1]]), curve.from_zero)
    _dress(axes, curve)
    _tokens_axis(axes, records)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw_train(axes, train: Series, smooth: bool) -> None:
    x, y = train
    if not len(x):
        return
    stride = max(1, len(x) // DRAWN)
    window = len(x) // WINDOWS
    if not smooth or window < 2:
        axes.plot(x[::stride], y[::stride], color=TRAIN, linewidth=1.4, label="train")
        return
    axes.plot(x[::stride], y[::stride], color=TRAIN, linewidth=0.6, alpha=0.35)
    mean = running_mean(y, window)
    axes.plot(x[::stride], mean[::stride], color=TRAIN, linewidth=1.6, label=f"train, mean of {window} steps")


def _limits(axes, y: np.ndarray, from_zero: bool) -> None:
    """A few spikes must not flatten the rest: where the maximum is far above the 99.5th percentile, the axis ends there
    and says what it cuts."""
    top = np.quantile(y, 0.995)
    if y.max() > 2 * top > 0:
        axes.set_ylim(top=1.1 * top)
        note = f"cut: the highest value is {y.max():.4g}"
        axes.annotate(note, (1, 0.97), xycoords="axes fraction", ha="right", va="top", color="#555555", fontsize=9)
    if from_zero:
        axes.set_ylim(bottom=0)


def _dress(axes, curve: Curve) -> None:
    axes.set_title(curve.title, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel(curve.label, color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if curve.key == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter())
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.margins(x=0.01)


def _tokens_axis(axes, records: list[dict]) -> None:
    """A second x axis in tokens, where the training records count them (`tokens`, cumulative)."""
    steps, tokens = series(records, "train", "tokens")
    if not len(steps) or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    each = tokens[-1] / steps[-1]
    top = axes.secondary_xaxis("top", functions=(lambda step: step * each, lambda count: count / each))
    top.xaxis.set_major_formatter(EngFormatter(sep=" "))
    top.set_xlabel("training tokens", color="#555555", fontsize=9)
    top.tick_params(colors="#555555", labelsize=8)
    top.spines["top"].set_visible(False)
