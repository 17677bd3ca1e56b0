"""A comparison of tiny arms, as gin files in a folder."""

import pathlib

from maxlike import config
from maxlike.compare.comparison import Comparison
from tests import tiny

ARM = """# A tiny arm.
from __gin__ import dynamic_registration
from layers import attention
from layers import mlp
from layers import stack
from maxlike import checkpoint
from maxlike import experiment
from maxlike import hooks
from maxlike import schedules
from maxlike.data import sources
from maxlike import warm_start
from maxlike.optimizers import adamw

include 'quickstart.gin'

"""
COMPARISON = """# A tiny comparison.
from __gin__ import dynamic_registration
from maxlike.compare import comparison
from maxlike.compare import matching
from maxlike.compare import rules

include 'jobs/compare.gin'

comparison.Comparison.title = 'Toy'
comparison.Comparison.source = 'nowhere'
comparison.Comparison.claim = 'One is better than the other.'
comparison.Comparison.falsified_by = 'It is not.'
comparison.Comparison.baseline = 'a'
comparison.Comparison.seeds = 2
"""
STEPS = 4
AFTER_A = ("experiment.Experiment.warm_start = @warm_start.WarmStart()", "warm_start.WarmStart.source = 'nowhere'")
QUICK = ("others/schedules.WSD.lr = 0.05", "held_out/sources.Text.start_byte = -8000")
VALIDATES = "experiment.Experiment.hooks = (@hooks.Validate(),)"


def arm(folder: pathlib.Path, name: str, *bindings: str) -> str:
    """Writes an arm; its name as an experiment."""
    path = folder / f"{name}.gin"
    lines = [
        *tiny.BINDINGS,
        "checkpoint.Checkpoints.every = 2",
        f"steps = {STEPS}",
        VALIDATES,
        *QUICK,
        *bindings,
    ]
    path.write_text(ARM + "\n".join(lines) + "\n")
    return str(path)


def comparison(folder: pathlib.Path, arms: tuple[str, ...], *bindings: str) -> str:
    """Writes a comparison of arms; its name."""
    path = folder / "toy.gin"
    lines = [f"comparison.Comparison.arms = {arms!r}", *bindings]
    path.write_text(COMPARISON + "\n".join(lines) + "\n")
    return str(path)


def load(name: str, *bindings: str, overlays: tuple[str, ...] = ()) -> Comparison:
    return config.load(name, overlays=overlays, bindings=bindings, kind=Comparison)
