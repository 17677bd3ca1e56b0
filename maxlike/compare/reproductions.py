"""docs/reproductions.md: what was reproduced, written from the verdicts under benchmarks/verdicts/ and never by hand.

    python -m maxlike.compare.reproductions                    writes the page
    python -m maxlike.compare.reproductions --add RUN_DIR      keeps the verdict of a comparison's run first

A verdict is a folder benchmarks/verdicts/<slug> with verdict.json and verdict.png; <slug> is the last part of the
comparison's name, and of each overlay that it was run with: `moma`, `moma-h200`.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from maxlike.compare.tables import number
from maxlike.compare.verdict import SCHEMA
from maxlike.console import duration, quantity
from maxlike.errors import UserError
from maxlike.manifest import write_text

VERDICTS = pathlib.Path("benchmarks") / "verdicts"
PAGE = pathlib.Path("docs") / "reproductions.md"
FILES = ("verdict.json", "verdict.png")

HEAD = """# Reproductions

What papers claim, measured here against their baselines: every arm at several paired seeds, matched as the paper
matches, judged by a rule that was written before the runs. "Does not hold" and "cannot tell" are results.

This page is written from the verdicts under `benchmarks/verdicts/` by `python -m maxlike.compare.reproductions`: do not
edit it. How to read a verdict, and how to write a comparison: [compare.md](compare.md).
"""


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Slug -> verdict.json, sorted. Raises UserError for a file that is none, or of another schema."""
    found = {}
    for path in sorted(folder.glob("*/verdict.json")):
        found[path.parent.name] = _load(path)
    return found


def _load(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no verdict ({error!r}): run the comparison again") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has the schema {schema}, this code writes {SCHEMA}: run the comparison again")
    return content


def text(verdicts: dict[str, dict[str, Any]]) -> str:
    """The page."""
    if not verdicts:
        return f"{HEAD}\nNo comparison has been run to its end yet.\n"
    head = "| paper | claim | verdict | effect, 95 % interval | what was run | command |\n|---|---|---|---|---|---|\n"
    rows = "".join(_row(slug, content) for slug, content in verdicts.items())
    return f"{HEAD}\n{head}{rows}" + "".join(_section(slug, content) for slug, content in verdicts.items())


def _row(slug: str, content: dict[str, Any]) -> str:
    cells = (
        f"[{content['title']}](#{slug.replace('_', '-')}), {content['source']}",
        content["claim"],
        f"**{content['verdict']}**",
        "<br>".join(_effect(one) for one in content["rule"]) or "no rule",
        _run(content),
        f"`{content['command']}`",
    )
    return f"| {' | '.join(_in_a_cell(cell) for cell in cells)} |\n"


def _section(slug: str, content: dict[str, Any]) -> str:
    lines = [f"\n## {slug.replace('_', '-')}\n", f"{content['title']}, {content['source']}.\n"]
    lines += [f"*{content['claim']}* {content['sentence'][0].upper()}{content['sentence'][1:]}.\n"]
    lines += [f"![{slug}]({_up(VERDICTS / slug / 'verdict.png')})\n"]
    lines += ["| criterion | outcome | mean | 95 % interval | claimed |\n|---|---|---|---|---|"]
    for one in content["rule"]:
        cells = (
            one["sentence"],
            one["outcome"],
            _mean(one),
            _interval(one),
            f"{one['side']} {number(one['boundary'])}",
        )
        lines.append(f"| {' | '.join(map(_in_a_cell, cells))} |")
    lines.append(f"\nIt would be falsified by: {content['falsified_by']}\n")
    diverged = [f"{arm} (seed {seed})" for arm, known in content["arms"].items() for seed in known["diverged"]]
    if diverged:
        lines.append(f"Diverged: {', '.join(diverged)}.\n")
    for name, known in content["scales"].items():
        lines.append(f"At the paper's scale ({name}): `{known['command']}`\n")
    lines.append(f"Code {content['revision']}, jax {content['versions']['jax']}.\n")
    return "\n".join(lines)


def _effect(one: dict[str, Any]) -> str:
    return f"{one['effect']} = {_mean(one)} ({_interval(one)})"


def _mean(one: dict[str, Any]) -> str:
    return "?" if one["mean"] is None else number(one["mean"])


def _interval(one: dict[str, Any]) -> str:
    low, high = ("?" if x is None else number(x) for x in one["interval"])
    return f"{low} to {high}"


def _run(content: dict[str, Any]) -> str:
    parameters = [arm["parameters"] for arm in content["arms"].values()]
    tokens = [arm["tokens"] for arm in content["arms"].values()]
    return (
        f"{len(content['arms'])} arms x {len(content['seeds'])} seeds, {_span(parameters)} parameters, "
        f"{_span(tokens)} tokens, {content['device']}, {duration(content['time']['training_seconds'])} of training"
    )


def _span(numbers: Sequence[float]) -> str:
    low, high = quantity(min(numbers)), quantity(max(numbers))
    return low if low == high else f"{low} to {high}"


def _in_a_cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def _up(path: pathlib.Path) -> str:
    """A path of the repository as a link from the page."""
    return (pathlib.Path("..") / path).as_posix()


def add(run_dir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Keeps a run's verdict under its slug; returns its folder. Raises UserError where there is none."""
    for name in FILES:
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir} has no {name}: name the run directory of a comparison that has a verdict")
    content = _load(run_dir / "verdict.json")
    if not content["experiment"]:
        raise UserError(f"{run_dir}/verdict.json names no experiment: run the comparison from its gin file")
    slug = "-".join(pathlib.PurePosixPath(name).stem for name in (content["experiment"], *content["overlays"]))
    kept = folder / slug
    kept.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run_dir / name, kept / name)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m maxlike.compare.reproductions", description=__doc__.split("\n")[0])
    parser.add_argument("--add", type=pathlib.Path, metavar="RUN_DIR", help="a comparison's run whose verdict to keep")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("."), help="of the repository")
    flags = parser.parse_args(arguments)
    try:
        if not (flags.root / PAGE.parent).is_dir():
            raise UserError(f"{flags.root.absolute()} has no {PAGE.parent}: run this in the repository, or give --root")
        if flags.add is not None:
            print(f"kept {add(flags.add, flags.root / VERDICTS)}")
        write_text(flags.root / PAGE, text(read(flags.root / VERDICTS)))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    print(f"written {flags.root / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
