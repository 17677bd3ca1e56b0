"""report.html of a comparison: the claim, the verdict, what was matched, curves, table, what would refute it."""

import html
import pathlib
from collections.abc import Sequence
from typing import Any

from maxlike.compare import metrics, plots, scale
from maxlike.compare.metrics import Metrics
from maxlike.compare.tables import cell, difference, number
from maxlike.console import duration, quantity
from maxlike.manifest import write_text
from maxlike.report import page

STYLE = """
body { max-width: 70rem; }
.source { color: #666; margin: 0 0 1.4rem; } .claim { font-size: 1.2rem; }
.verdict { border-left: 8px solid; border-radius: 4px; padding: .9rem 1.3rem; margin: 1.4rem 0; background: #f6f6f4; }
.verdict b { display: block; font-size: 2.1rem; line-height: 1.2; }
.curves { grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); }
.single .curves { grid-template-columns: minmax(0, 54rem); }
.wide { overflow-x: auto; } .wide table { font-size: .92rem; }
.wide th { text-align: left; font-weight: 600; padding: .3rem 1.4rem .3rem 0; vertical-align: bottom; }
.wide tr { border-bottom: 1px solid #e4e4e4; } .wide td { font-variant-numeric: tabular-nums; }
.wide td:first-child { color: #222; } .wide small { display: block; color: #666; white-space: nowrap; }
"""


def write(run_dir: pathlib.Path, content: dict[str, Any], measured: Metrics) -> None:
    """Writes report.html and its PNG pictures. content: of verdict.json."""
    pictures = draw(content, measured)
    for name, picture in pictures.items():
        (run_dir / f"{name}.png").write_bytes(picture)
    write_text(run_dir / "report.html", text(content, pictures))


def draw(content: dict[str, Any], measured: Metrics) -> dict[str, bytes]:
    """Name -> PNG: `verdict` (the rule and the first curve), `rule`, `curve-KEY`, and one for each metric shown."""
    made = {"verdict": plots.verdict(content, measured), "rule": plots.rule(content["rule"])}
    made |= {f"curve-{_file(key)}": plots.curves(measured, key) for key in curve_keys(content)}
    made |= {_file(metric): plots.points(measured, metric) for metric in content["metrics"]}
    return {name: picture for name, picture in made.items() if picture is not None}


def curve_keys(content: dict[str, Any]) -> tuple[str, ...]:
    """Keys of the training curves that the metrics shown are read from, the loss first."""
    names = [metrics.parse(metric) for metric in content["metrics"]]
    return tuple(dict.fromkeys(["loss", *(n.key for n in names if n.kind in ("train", "eta", "spikes"))]))


def _file(name: str) -> str:
    return name.replace("/", "-")


def text(content: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page."""
    colour = plots.OUTCOMES[content["verdict"]]
    several = len(content["seeds"]) > 1
    curves = [(key, pictures.get(f"curve-{_file(key)}")) for key in curve_keys(content)]
    shown = [(metric, pictures.get(_file(metric))) for metric in content["metrics"]]
    band = "Lines are means over seeds, bands their range." if several else "One seed."
    parts = [
        f"<h1>{html.escape(content['title'])}</h1><p class=source>{html.escape(content['source'])}</p>",
        f"<p class=claim>{html.escape(content['claim'])}</p>",
        f'<div class=verdict style="border-color:{colour}"><b style="color:{colour}">'
        f"{html.escape(content['verdict'])}</b>{html.escape(_why(content))}.</div>",
        page.section("The rule, written before the runs", _rule(content, pictures)),
        page.section("What was matched", _matched(content)),
        page.section("Curves", f"<p>{band} Below: less the baseline of the same seed.</p>" + _single(curves)),
        page.section("Metrics by arm", _metrics(shown) + _table(content)),
        page.section("Runs that diverged", _diverged(content)),
        page.section("What would show that the claim is wrong", f"<p>{html.escape(content['falsified_by'])}</p>"),
        page.section("At the paper's scale", _scales(content)),
        page.section("How it was run", _how(content)),
    ]
    return page.document(content["title"], parts, STYLE)


def _single(titled: Sequence[tuple[str, bytes | None]]) -> str:
    """Pictures one under the other."""
    return f"<div class=single>{page.images([(title, png) for title, png in titled if png is not None])}</div>"


def _why(content: dict[str, Any]) -> str:
    """The verdict's sentence without the verdict."""
    return content["sentence"].removeprefix(content["verdict"]).lstrip(":, ")


def _rule(content: dict[str, Any], pictures: dict[str, bytes]) -> str:
    if not content["rule"]:
        return "<p>None was written, so nothing can be told.</p>"
    rows = [("criterion", "outcome", "mean", "95 % interval", "claimed", "seeds that would tell")]
    for one in content["rule"]:
        low, high = (number(x) if x is not None else "?" for x in one["interval"])
        need = "more than 1000" if one["seeds_needed"] is None else str(one["seeds_needed"])
        told = one["outcome"] != "cannot tell"
        rows.append(
            (
                one["sentence"],
                one["outcome"],
                "?" if one["mean"] is None else number(one["mean"]),
                f"{low} to {high}",
                f"{one['side']} {number(one['boundary'])}",
                one["note"] or ("" if told else need),
            )
        )
    picture = _single([("the rule", pictures["rule"])])
    return (
        "<p>The claim holds if all criteria do, and does not hold if one does not. Each is read from the 95 % t "
        "interval of the paired difference over seeds (of a ratio, on logarithms): it has to lie wholly on one side of "
        f"the line; the claim's side is shaded.</p>{_wide(rows)}{picture}"
    )


def _matched(content: dict[str, Any]) -> str:
    matched, arms = content["matched"], content["arms"]
    if matched is None:
        return ""
    rows = [("arm", matched["quantity"], "from the baseline", "parameters", "tokens", "training FLOPs, all told")]
    for arm, amount in matched["values"].items():
        apart = "left out" if arm in matched["left_out"] else f"{100 * matched['relative'][arm]:+.2f} %"
        known = arms[arm]
        rows.append(
            (
                arm + (f", after {known['after']}" if known["after"] else ""),
                quantity(amount, matched["unit"]),
                "baseline" if arm == content["baseline"] else apart,
                quantity(known["parameters"]),
                quantity(known["tokens"]),
                quantity(known["flops"]),
            )
        )
    words = (
        f"Arms may differ by {100 * matched['tolerance']:.3g} %. Runs of one seed saw the same data in the same order."
    )
    return f"<p>{words}</p>{_wide(rows)}"


def _metrics(shown: Sequence[tuple[str, bytes | None]]) -> str:
    found = [(metric, png) for metric, png in shown if png is not None]
    words = "<p>Points are seeds, strokes their mean, the dashed line the baseline's mean.</p>"
    return words + page.images(found) if found else ""


def _table(content: dict[str, Any]) -> str:
    """Arms down, metrics across: the mean over seeds, below it the paired difference from the baseline."""
    if not content["metrics"]:
        return ""
    head = "".join(f"<th>{html.escape(m)}</th>" for m in content["metrics"])
    lines = [f"<tr><th>arm</th>{head}</tr>"]
    for arm in content["arms"]:
        cells = []
        for metric in content["metrics"].values():
            entry = metric["arms"].get(arm)
            below = [] if entry is None else difference(entry)
            small = "".join(f"<small>{html.escape(line)}</small>" for line in below)
            cells.append(f"<td>{'' if entry is None else html.escape(cell(entry))}{small}</td>")
        lines.append(f"<tr><td>{html.escape(arm)}</td>{''.join(cells)}</tr>")
    words = "<p>Mean over seeds; below it the paired difference from the baseline with its 95 % interval.</p>"
    return f"{words}<div class=wide><table>{''.join(lines)}</table></div>"


def _diverged(content: dict[str, Any]) -> str:
    rows = [
        (f"{arm}, seed {seed}", why)
        for arm, known in content["arms"].items()
        for seed, why in known["diverged"].items()
    ]
    return page.table(rows)


def _scales(content: dict[str, Any]) -> str:
    return "".join(
        page.command(f"{name}: {scale.words(known)}", known["command"]) + _costs(known)
        for name, known in content["scales"].items()
    )


def _costs(known: dict[str, Any]) -> str:
    """What one run of each arm takes there."""
    rows = [("arm, one run", "parameters", "tokens", "time", "dollars")]
    for arm, run in known.get("arms", {}).items():
        dollars = "" if run["dollars"] is None else f"{run['dollars']:,.0f}"
        rows.append((arm, quantity(run["parameters"]), quantity(run["tokens"]), duration(run["seconds"]), dollars))
    return _wide(rows) if rows[1:] else ""


def _how(content: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    facts = [
        ("seeds", ", ".join(map(str, content["seeds"]))),
        ("steps", ", ".join(sorted({f"{arm['steps']:,}" for arm in content["arms"].values()}))),
        ("device", content["device"]),
        ("training time, all runs", duration(content["time"]["training_seconds"])),
        ("written", content["time"]["written"]),
        ("code", content["revision"]),
        ("packages", versions),
    ]
    return page.command("", content["command"]).replace("<p></p>", "") + page.table(facts)


def _wide(rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(x)}</th>" for x in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in row)}</tr>" for row in rows[1:])
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"
