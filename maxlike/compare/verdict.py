"""What a comparison's runs say: verdict.json, the pictures, report.html."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import shlex
import time
from collections.abc import Sequence
from typing import Any

import jax

from maxlike.compare import metrics, records, rules, statistics
from maxlike.compare.comparison import Comparison
from maxlike.compare.matching import Matched
from maxlike.compare.metrics import Metrics, Run, Value
from maxlike.compare.runs import Finished
from maxlike.compare.scale import at_scales
from maxlike.manifest import write_text

SCHEMA = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """outcome: of the whole rule. sentence: it in one sentence. judged: of each criterion. content: verdict.json."""

    outcome: statistics.Outcome
    sentence: str
    judged: tuple[rules.Judged, ...]
    content: dict[str, Any]


def conclude(
    comparison: Comparison, finished: Sequence[Finished], run_dir: pathlib.Path, matched: Matched | None = None
) -> Verdict:
    """Judges the runs by the comparison's rule; writes verdict.json, PNG pictures and report.html into run_dir.

    matched: the table of what the arms have in common. Raises UserError for a criterion or a metric to be shown that
    the runs did not write.
    """
    from maxlike.compare import report  # matplotlib takes half a second: not before it is needed

    verdict = judge(comparison, finished, matched)
    verdict.content["scales"] = at_scales(comparison)
    write_text(pathlib.Path(run_dir) / "verdict.json", dumps(verdict.content))
    report.write(pathlib.Path(run_dir), verdict.content, metrics_of(comparison, finished))
    return verdict


def judge(comparison: Comparison, finished: Sequence[Finished], matched: Matched | None = None) -> Verdict:
    """The verdict without its files, and without what the plan says of the paper's scale."""
    rules.check_arms(comparison.rule, tuple(comparison.experiments))
    measured = metrics_of(comparison, finished)
    refuse_unwritten(comparison, measured)
    judged = tuple(criterion.judge(measured.values) for criterion in comparison.rule)
    content = _content(comparison, finished, measured, judged, matched)
    return Verdict(content["verdict"], content["sentence"], judged, content)


def metrics_of(comparison: Comparison, finished: Sequence[Finished]) -> Metrics:
    """What the runs wrote, by name."""
    return Metrics(runs_of(comparison, finished), baseline=comparison.baseline)


def dumps(content: dict[str, Any]) -> str:
    """The text of verdict.json."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def runs_of(comparison: Comparison, finished: Sequence[Finished]) -> list[Run]:
    """Finished runs as what metrics are read from; the FLOPs of the runs that one begins from come before its own."""

    def flops_per_step(one: Finished) -> float:
        experiment = one.experiment
        return experiment.bare().flops_per_token(experiment.sequence_length) * experiment.clock.tokens_per_step

    cost = {arm_of(one): flops_per_step(one) for one in finished}
    whole = {arm_of(one): one.experiment.steps * cost[arm_of(one)] for one in finished}
    order = list(comparison.experiments)
    found = []
    for one in sorted(finished, key=lambda one: (order.index(arm_of(one)), one.planned.seed)):
        arm = arm_of(one)
        shift = sum(whole[ancestor] for ancestor in comparison.ancestors(arm) if ancestor in whole)
        path = pathlib.Path(one.directory) / "metrics.jsonl"
        found.append(Run(arm, one.planned.seed, path, one.experiment.steps, cost[arm], shift, one.diverged))
    return found


def arm_of(one: Finished) -> str:
    """Its short name."""
    return one.planned.name.rpartition("/")[2]


def shown_metrics(comparison: Comparison) -> tuple[str, ...]:
    """Names of all metrics that the table and the plots show: the rule's, then the further ones."""
    of_rule = [metric for criterion in comparison.rule for metric in criterion.reads]
    return tuple(dict.fromkeys([*of_rule, *comparison.metrics]))


def refuse_unwritten(comparison: Comparison, measured: Metrics) -> None:
    """Raises UserError where the rule names a metric that one of its arms did not write, or `metrics` one of nobody."""
    for criterion in comparison.rule:
        by = f"the rule '{criterion.sentence()}'"
        for metric in criterion.reads:
            measured.refuse_unwritten(metric, [arm for arm in criterion.arms if arm in measured.arms], by)
    for metric in comparison.metrics:
        measured.refuse_unwritten(metric)


def refuse_unwritten_by(comparison: Comparison, one: Finished) -> None:
    """The same of one run, and of the rule alone: a name that nobody writes is refused before the other runs."""
    measured = metrics_of(comparison, [one])
    for criterion in comparison.rule:
        for metric in criterion.reads if arm_of(one) in criterion.arms else ():
            measured.refuse_unwritten(metric, [arm_of(one)], f"the rule '{criterion.sentence()}'")


def _content(
    comparison: Comparison,
    finished: Sequence[Finished],
    measured: Metrics,
    judged: Sequence[rules.Judged],
    matched: Matched | None,
) -> dict[str, Any]:
    outcome = statistics.together([one.outcome for one in judged])
    name = "" if comparison.config is None else comparison.config.name
    seeds = sorted({run.seed for run in measured.runs.values()})
    ended = [_record(one) for one in finished]
    devices = {f"{record['devices']} x {record['device_kind']}" for record in ended}
    return {
        "schema": SCHEMA,
        "experiment": name,
        "overlays": list(comparison.overlays),
        "title": comparison.title,
        "source": comparison.source,
        "claim": comparison.claim,
        "falsified_by": comparison.falsified_by,
        "verdict": outcome,
        "sentence": sentence(outcome, judged, len(seeds)),
        "rule": [
            _criterion(criterion, one) | {"metrics": list(criterion.reads), "arms": list(criterion.arms)}
            for criterion, one in zip(comparison.rule, judged, strict=True)
        ],
        "metrics": {metric: _metric(metric, measured) for metric in shown_metrics(comparison)},
        "matched": None if matched is None else _match(matched),
        "baseline": comparison.baseline,
        "arms": {arm: _arm(arm, comparison, finished, measured) for arm in measured.arms},
        "seeds": seeds,
        "command": command(comparison, len(seeds)),
        "scales": {},
        "device": ", ".join(sorted(devices)),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "revision": " and ".join(sorted({record["code"] for record in ended})),
        "time": {
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "training_seconds": round(sum(_seconds(run, finished) for run in measured.runs.values()), 1),
        },
    }


def sentence(outcome: statistics.Outcome, judged: Sequence[rules.Judged], seeds: int) -> str:
    """The verdict in one sentence."""
    if not judged:
        return "cannot tell: the comparison has no rule"
    many = f"{len(judged)} criteria" if len(judged) > 1 else "the one criterion"
    if outcome == "holds":
        return f"holds: {f'all {many}' if len(judged) > 1 else many} at {seeds} seeds"
    concerned = [one for one in judged if one.outcome == outcome]
    count = f"{len(concerned)} of {len(judged)} criteria" if len(judged) > 1 else "its one criterion"
    first = f", such as: {concerned[0].sentence}" if len(concerned) > 1 else f": {concerned[0].sentence}"
    if outcome == "does not hold":
        return f"does not hold, by {count}{first}"
    return f"cannot tell, for {count}{first}; {more_seeds([one.decision for one in concerned], seeds)}"


def more_seeds(decisions: Sequence[statistics.Decision], seeds: int) -> str:
    """How many seeds would tell."""
    if any(math.isnan(decision.interval.sd) for decision in decisions):
        return f"from {seeds} seed{'s' * (seeds != 1)} as they are, it cannot be said how many would tell"
    needed = [decision.seeds_needed for decision in decisions]
    if None in needed:
        return f"at this spread more than {statistics.MOST_SEEDS} seeds would be needed to tell"
    return f"at this spread {max(needed)} seeds would tell, {seeds} were run"


def _criterion(criterion: rules.Criterion, one: rules.Judged) -> dict[str, Any]:
    """In the unit that a person reads: of a ratio, not its logarithm."""
    unit = math.exp if one.log else float
    found = one.decision.interval
    return {
        "kind": type(criterion).__name__,
        "sentence": one.sentence,
        "outcome": one.outcome,
        "effect": one.effect,
        "side": one.side,
        "boundary": unit(one.boundary),
        "mean": _plain(found.mean, unit),
        "interval": [_plain(found.low, unit), _plain(found.high, unit)],
        "log": one.log,
        "values": {str(seed): _ends(Value(*ends), unit) for seed, ends in one.values.items()},
        "seeds_needed": one.decision.seeds_needed,
        "note": one.note,
    }


def _metric(metric: str, measured: Metrics) -> dict[str, Any]:
    """Of each arm the value of each seed, their mean, and the paired difference from the baseline."""
    base, arms = measured.values(metric, measured.baseline), {}
    for arm in measured.arms:
        values = measured.values(metric, arm)
        if not values:
            continue
        known = [value.low for value in values.values() if value.known]
        entry: dict[str, Any] = {
            "values": {str(seed): _ends(value) for seed, value in values.items()},
            "mean": math.fsum(known) / len(known) if len(known) == len(values) else None,
        }
        both = [seed for seed in values if seed in base]
        if arm != measured.baseline and both and all(values[s].known and base[s].known for s in both):
            found = statistics.interval([values[seed].low - base[seed].low for seed in both])
            entry["difference"] = {"mean": found.mean, "interval": [_plain(found.low), _plain(found.high)]}
        arms[arm] = entry
    return {"described": metrics.described(metric), "arms": arms}


def _match(matched: Matched) -> dict[str, Any]:
    return {
        "quantity": matched.quantity,
        "unit": matched.unit,
        "tolerance": matched.tolerance,
        "values": matched.values,
        "relative": {arm: matched.relative(arm) for arm in matched.values},
        "left_out": list(matched.left_out),
        "total_flops": matched.total_flops,
    }


def _arm(arm: str, comparison: Comparison, finished: Sequence[Finished], measured: Metrics) -> dict[str, Any]:
    one = min((one for one in finished if arm_of(one) == arm), key=lambda one: one.planned.seed)
    experiment, runs = one.experiment, measured.of(arm)
    return {
        "experiment": comparison.experiments[arm],
        "after": comparison.after.get(arm),
        "steps": experiment.steps,
        "tokens": experiment.steps * experiment.clock.tokens_per_step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_model().params)),
        "flops": runs[0].flops,
        "training_seconds": {str(run.seed): round(_seconds(run, finished), 1) for run in runs},
        "fingerprint": _record(one)["fingerprint"],
        "diverged": {str(run.seed): run.diverged for run in runs if run.diverged is not None},
    }


def _record(one: Finished) -> dict[str, Any]:
    """What was recorded when the run had ended."""
    return json.loads((pathlib.Path(one.directory) / records.FINISHED).read_text(encoding="utf-8"))


def _seconds(run: Run, finished: Sequence[Finished]) -> float:
    """Of its training steps, by the rate on their lines."""
    one = next(one for one in finished if (arm_of(one), one.planned.seed) == (run.arm, run.seed))
    rates = run.column("train", "tokens_per_second")[1]
    return float((one.experiment.clock.tokens_per_step / rates[rates > 0]).sum())


def command(comparison: Comparison, seeds: int) -> str:
    """The command line that runs the comparison as it was run."""
    words = ["python", "-m", "launch", "--experiment", "NAME" if comparison.config is None else comparison.config.name]
    for overlay in comparison.overlays:
        words += ["--overlay", overlay]
    for binding in (*comparison.own_bindings, *comparison.bindings):
        words += ["--set", binding]
    return shlex.join(words + (["--seeds", str(seeds)] if seeds != comparison.seeds else []))


def _ends(value: Value, unit: Any = float) -> Any:
    """A number; null where it is unknown or infinite; [low, high] where it is known by bounds."""
    low, high = _plain(value.low, unit), _plain(value.high, unit)
    return low if value.low == value.high else [low, high]


def _plain(x: float, unit: Any = float) -> float | None:
    return unit(x) if math.isfinite(x) else None
