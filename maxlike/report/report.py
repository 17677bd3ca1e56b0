"""report.html: everything about a run on one page that needs no other file and no network."""

import html
from collections.abc import Sequence

import numpy as np

from maxlike.console import quantity
from maxlike.report import page
from maxlike.report.records import read, series
from maxlike.run_dir import RunDirectory

# What hooks draw, and what it shows.
PICTURES = {
    "reconstructions.png": "Held-out pictures, each above what is decoded from its ids",
    "samples.png": "Pictures made by the model, a row a caption",
}


def write_report(
    run: RunDirectory,
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    samples: Sequence[tuple[str, str]] = (),
    commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes report.html and a PNG for each curve into the run directory, from its metrics.jsonl and config.gin.

    facts: (name, value) rows of what was trained. samples: (prompt, continuation). commands: (what it does, command
    line), such as the one that generates from the model. Curves and numbers that the metrics do not hold are left out.
    """
    from maxlike.report.curves import CURVES, draw  # matplotlib takes half a second: not before the first step of a run

    records = read(run.metrics)
    images = []
    for curve in CURVES:
        png = draw(curve, records)
        if png is not None:
            run.file(f"{curve.name}.png").write_bytes(png)
            images.append((curve.title, png))
    config = run.config.read_text(encoding="utf-8") if run.config.is_file() else ""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _numbers(final_numbers(records)),
        page.section("The run", page.table(facts)),
        page.section("Commands", "".join(page.command(what, line) for what, line in commands)),
        page.section("Curves", page.images(images)),
        page.section("Samples", "".join(_sample(prompt, text) for prompt, text in samples)),
        page.section("Pictures", _pictures(run)),
        page.section("Configuration", f"<pre>{html.escape(config)}</pre>" if config else ""),
    ]
    run.write_text("report.html", page.document(title, parts))


def final_numbers(records: list[dict]) -> list[tuple[str, str]]:
    """(what, value) of where the run ended: the last and the best validation metrics, the last training loss, speed."""
    numbers = []
    for key, form in (("bits_per_byte", "{:.3f}"), ("loss", "{:.4f}")):
        name = key.replace("_", " ")
        steps, values = series(records, "validation", key)
        if len(values):
            numbers.append((f"validation {name}", form.format(values[-1])))
            best = int(np.argmin(values))
            if best != len(values) - 1:
                numbers.append((f"best, at step {steps[best]:,.0f}", form.format(values[best])))
    steps, losses = series(records, "train", "loss")
    if len(losses):
        numbers.append((f"training loss, step {steps[-1]:,.0f}", f"{losses[-1]:.4f}"))
    speeds = series(records, "train", "tokens_per_second")[1]
    if len(speeds):
        numbers.append(("tokens a second, median", quantity(float(np.median(speeds)))))
    return numbers


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    cells = (
        f'<div class="number"><b>{html.escape(x)}</b><span>{html.escape(name)}</span></div>' for name, x in numbers
    )
    return f'<div class="numbers">{"".join(cells)}</div>' if numbers else ""


def _pictures(run: RunDirectory) -> str:
    """The pictures that hooks left in the run."""
    there = [(title, run.file(name)) for name, title in PICTURES.items() if run.file(name).is_file()]
    return "".join(f"<p>{title}</p>{page.images([(title, path.read_bytes())])}" for title, path in there)


def _sample(prompt: str, text: str) -> str:
    return f"<blockquote><b>{html.escape(prompt)}</b>{html.escape(text)}</blockquote>"
