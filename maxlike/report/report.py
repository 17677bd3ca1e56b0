"""report.html: everything about a run on one page that needs no other file and no network."""

import base64
import html
from collections.abc import Sequence

import numpy as np

from maxlike.console import quantity
from maxlike.report.records import read, series
from maxlike.run_dir import RunDirectory

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; }
table { border-collapse: collapse; } td { padding: .22rem 1.4rem .22rem 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; }
.numbers { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.number { border: 1px solid #ddd; border-radius: 6px; padding: .55rem 1rem; min-width: 8rem; }
.number b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; } .number span { color: #666; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; }
pre { background: #f6f6f4; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
blockquote { margin: 0 0 1.2rem; padding: .1rem 0 .1rem 1rem; border-left: 3px solid #d1652b; white-space: pre-wrap;
  overflow-wrap: anywhere; } blockquote b { color: #2f6fb5; }
"""

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
        _section("The run", _table(facts)),
        _section("Commands", "".join(_command(what, line) for what, line in commands)),
        _section("Curves", _images(images)),
        _section("Samples", "".join(_sample(prompt, text) for prompt, text in samples)),
        _section("Pictures", _pictures(run)),
        _section("Configuration", f"<pre>{html.escape(config)}</pre>" if config else ""),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    run.write_text(
        "report.html", f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


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


def _section(name: str, content: str) -> str:
    return f"<h2>{name}</h2>\n{content}" if content else ""


def _numbers(numbers: Sequence[tuple[str, str]]) -> str:
    cells = (
        f'<div class="number"><b>{html.escape(x)}</b><span>{html.escape(name)}</span></div>' for name, x in numbers
    )
    return f'<div class="numbers">{"".join(cells)}</div>' if numbers else ""


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>" if rows else ""


def _images(images: Sequence[tuple[str, bytes]]) -> str:
    cells = (f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(x).decode()}">' for title, x in images)
    return f'<div class="curves">{"".join(cells)}</div>' if images else ""


def _command(what: str, line: str) -> str:
    return f"<p>{html.escape(what)}</p><pre>{html.escape(line)}</pre>"


def _pictures(run: RunDirectory) -> str:
    """The pictures that hooks left in the run."""
    there = [(title, run.file(name)) for name, title in PICTURES.items() if run.file(name).is_file()]
    return "".join(f"<p>{title}</p>{_images([(title, path.read_bytes())])}" for title, path in there)


def _sample(prompt: str, text: str) -> str:
    return f"<blockquote><b>{html.escape(prompt)}</b>{html.escape(text)}</blockquote>"
