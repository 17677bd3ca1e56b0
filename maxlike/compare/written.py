"""The rule as it was before any result was known, kept beside the runs.

A rule that is changed afterwards proves nothing: `rule.json` is written before the first run, and from the end of that
one on whoever would judge the same runs by another rule is refused.
"""

import json
import pathlib
from typing import Any

import jax

from maxlike.compare.comparison import Comparison
from maxlike.compare.records import FINISHED
from maxlike.errors import UserError
from maxlike.manifest import write_text

FILE = "rule.json"


def keep(comparison: Comparison, run_dir: pathlib.Path, runs: pathlib.Path) -> None:
    """Writes the rule; where one of `runs` has ended, only if there is none yet. All processes of a multi-host job call
    it alike. Raises UserError where another rule is there, or a damaged one."""
    path, now = pathlib.Path(run_dir) / FILE, _content(comparison)
    if path.exists() and any(runs.glob(f"*/*/{FINISHED}")):
        _refuse_other(path, now)
    elif jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(now, indent=1) + "\n")


def _content(comparison: Comparison) -> dict[str, Any]:
    """What decides: the criteria with their numbers, and the arm that speed-ups are relative to."""
    rule = [
        {"kind": type(criterion).__name__, "sentence": criterion.sentence()}
        | {knob: x for knob, x in vars(criterion).items() if isinstance(x, str | float | int)}
        for criterion in comparison.rule
    ]
    return {"baseline": comparison.baseline, "rule": rule}


def _refuse_other(path: pathlib.Path, now: dict[str, Any]) -> None:
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        sentences = [one["sentence"] for one in then["rule"]]
        baseline = then["baseline"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, so the rule of these runs is lost: name another --run_dir") from None
    if then == now:
        return
    change = f"it had {len(sentences)} criteria, now {len(now['rule'])}"
    for one, other in zip(then["rule"], now["rule"]):
        if one != other:
            change = f"it was '{one['sentence']}', now '{other['sentence']}'"
            break
    if baseline != now["baseline"]:
        change = f"the baseline was {baseline}, now {now['baseline']}"
    raise UserError(
        f"the rule is not the one that {path} holds from before the runs ({change}): judge them by that one, or name "
        "another --run_dir and run again"
    )
