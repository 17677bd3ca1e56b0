"""The quickstart at a size that compiles in a second, for tests of everything around the network."""

import json
import pathlib

from maxlike import config

BINDINGS = (
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "dim = 16",
    "stack.Stack.depth = 2",
    "attention.Attention.heads = 2",
    "mlp.GatedMLP.width = 32",
    "experiment.Experiment.batch_size = 8",
    "experiment.Experiment.sequence_length = 32",
    "experiment.Experiment.hooks = ()",
    "checkpoint.Checkpoints.every = 4",
    "steps = 12",
)


def load(*bindings: str, overlays: tuple[str, ...] = (), job: str | None = None):
    return config.load("quickstart", overlays=overlays, bindings=[*BINDINGS, *bindings], job=job)


def flags(*bindings: str) -> list[str]:
    """The same as arguments of the command line."""
    return [word for binding in (*BINDINGS, *bindings) for word in ("--set", binding)]


def rows(run: pathlib.Path, split: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def losses(run: pathlib.Path) -> dict[int, float]:
    """step -> loss; fails where a step is there twice."""
    train = rows(run)
    steps = [row["step"] for row in train]
    assert len(set(steps)) == len(steps), "a step is in metrics.jsonl twice"
    return {row["step"]: row["loss"] for row in train}
