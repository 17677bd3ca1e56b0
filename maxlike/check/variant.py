"""What the rows of the check are made of: a variant of the twin, a line of the table, a reason to leave one out."""

import contextlib
import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from layers import kernels
from maxlike.check.compare import Comparison
from maxlike.experiment import Experiment
from maxlike.sharding import Layout

# A step ten times as long amplifies the rounding of the first gradient 30-fold in the second one of linear attention;
# this one leaves it alone, and still moves a loss by 300 times the tolerance.
RATE = 0.01


class LeftOut(Exception):
    """A row that cannot be run on this experiment; the text says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    name: what `--rows` selects it by. compared: what was compared. result: None where it was not run, then `note` says
    why; else `note` is the first tensor that departs, or what was left out of the comparison. failed: whether the
    promise of this row does not hold.
    """

    name: str
    compared: str
    result: Comparison | None
    note: str
    failed: bool
    trace: str = ""

    @property
    def verdict(self) -> str:
        if self.result is None and not self.failed:
            return "left out"
        return "DEPARTS" if self.failed else "equal"


class Recorder:
    """The optimizer of the check: gradient descent that keeps the gradient in its state, where it can be compared."""

    def schedule(self, clock: Any) -> Callable:
        return lambda step: jnp.float32(RATE)

    def __call__(self, names: Any, clock: Any) -> optax.GradientTransformation:
        def init(params: Any) -> dict:
            return {"gradient": jax.tree.map(jnp.zeros_like, params)}

        def update(gradient: Any, state: dict, params: Any = None) -> tuple[Any, dict]:
            return jax.tree.map(lambda g: -RATE * g, gradient), {"gradient": gradient}

        return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """One way to compute what the twin computes: other bindings, another mesh, other implementations.

    experiment: with the Recorder for an optimizer. layout: its mesh. choices: (op, implementation) of `kernels`.
    """

    experiment: Experiment
    layout: Layout
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def staged(self) -> bool:
        """Whether its mesh cuts the layers into stages, which work on micro-batches."""
        return bool(self.layout.mesh_axes("layers"))

    def chosen(self) -> contextlib.ExitStack:
        """Inside this context programs are traced with `choices`."""
        stack = contextlib.ExitStack()
        for op, implementation in self.choices:
            stack.enter_context(kernels.choose(op, implementation))
        return stack


def broken(name: str, compared: str, error: Exception) -> Row:
    """The row of a comparison that raised an exception: it does not hold, and the table goes on."""
    lines = str(error).strip().splitlines()
    trace = "".join(traceback.format_exception(error))
    return Row(name, compared, None, f"{type(error).__name__}: {lines[0] if lines else ''}", failed=True, trace=trace)
