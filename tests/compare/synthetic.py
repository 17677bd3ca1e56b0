"""A comparison whose runs were never trained: metrics.jsonl files with losses that are known."""

import atexit
import dataclasses
import functools
import json
import math
import pathlib
import shutil
import tempfile

import numpy as np

from maxlike.compare import records, verdict
from maxlike.compare.comparison import Comparison
from maxlike.compare.matching import Matched
from maxlike.compare.records import Fingerprint
from maxlike.compare.rules import Above, Lower, Ratio
from maxlike.compare.runs import Finished, Planned
from tests import tiny

STEPS = 200


@functools.cache
def experiment():
    return tiny.load()


def finite(x: float) -> float | None:
    """As the writer of metrics does."""
    return x if math.isfinite(x) else None


def write(directory: pathlib.Path, losses, *, kurtosis: float | None = None, tokens_per_step: int = 256) -> None:
    """A run directory with these training losses, a validation at its end, and a measured kurtosis."""
    directory.mkdir(parents=True, exist_ok=True)
    losses = [float(x) for x in losses]
    lines = [
        {"step": i + 1, "split": "train", "loss": finite(x), "loss/image": finite(2 * x + 1),
         "tokens": (i + 1) * tokens_per_step, "tokens_per_second": 1000.0, "load": [0.25, 0.75]}
        for i, x in enumerate(losses)
    ]  # fmt: skip
    lines.append({"step": len(losses), "split": "validation", "loss": finite(losses[-1] + 0.1), "bits_per_byte": 1.5})
    if kurtosis is not None:
        lines.append({"step": len(losses), "split": "measured", "kurtosis": kurtosis})
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)


def curve(rng, better: float, steps: int = STEPS) -> np.ndarray:
    x = np.arange(1, steps + 1)
    return 3 - better + 4 * np.exp(-x / (0.25 * steps * (1 - better))) + rng.normal(0, 0.03, steps)


def finished(comparison: Comparison, root: pathlib.Path, better: dict[str, float], diverged=()) -> list[Finished]:
    """Runs of every arm and seed. better: of an arm, by how much its loss lies lower."""
    made = []
    for index, arm in enumerate(comparison.experiments):
        for seed in range(comparison.seeds):
            directory = root / "arms" / arm / f"seed_{seed}"
            common = np.random.default_rng(seed).normal(0, 0.08)
            rng = np.random.default_rng(1000 * index + seed)
            losses = curve(rng, better[arm]) + common
            kurtosis = float(np.exp(rng.normal(0, 0.2)) * (0.2 if better[arm] > 0.2 else 90))
            why = "10 bad steps in a row" if (arm, seed) in diverged else None
            if why is not None:
                losses = losses[: STEPS // 3] + np.linspace(0, 0.5, STEPS // 3)
            write(directory, losses, kurtosis=None if why else kurtosis)
            changed = dataclasses.replace(experiment(), steps=STEPS, seed=seed)
            records.finish(directory, Fingerprint((arm, f"seed {seed}")), why, 1.0)
            made.append(Finished(Planned(arm, comparison.experiments[arm], seed=seed), directory, changed, why))
    return made


def matched(comparison: Comparison) -> Matched:
    amounts = {arm: 1e6 * (1 + 0.004 * i) for i, arm in enumerate(comparison.experiments)}
    total = {arm: 200 * 256 * amount for arm, amount in amounts.items()}
    return Matched("training FLOPs a token", "FLOPs", 0.02, amounts, (), comparison.baseline, total)


def comparison(**changes) -> Comparison:
    knobs = {
        "title": "Sparse <models>",
        "source": "Somebody, arXiv 0000.00000",
        "claim": "At equal FLOPs a sparse model has a lower loss than a dense one.",
        "falsified_by": "A sparse model whose loss is above the dense one's.",
        "arms": ("papers/sparse/dense", "papers/sparse/sparse", "papers/sparse/twin"),
        "baseline": "dense",
        "rule": (
            Lower(metric="train/loss", arm="sparse", than="dense"),
            Ratio(metric="measured/kurtosis", arm="sparse", than="dense", below=0.2),
            Above(metric="eta/loss", arm="sparse", value=1.0),
        ),
        "metrics": ("validation/loss", "train/loss/image", "spikes/loss"),
    }
    return Comparison(**(knobs | changes))


BETTER = {"dense": 0.0, "sparse": 0.3, "twin": 0.0}


@functools.cache
def concluded():
    """(run directory, comparison, runs, verdict) of an arm that is better and one that is the baseline again, of which
    one run diverged; made once, pictures take seconds."""
    root = pathlib.Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    against = comparison()
    runs = finished(against, root, BETTER, diverged={("twin", 1)})
    return root, against, runs, verdict.conclude(against, runs, root, matched(against))
