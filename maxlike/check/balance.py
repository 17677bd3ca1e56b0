"""The row about routers that balance their experts by a bias: an overloaded expert must become less wanted."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from layers.axes import keep
from maxlike import checkpoint_tree
from maxlike.check.compare import Comparison
from maxlike.check.subject import Subject
from maxlike.check.variant import LeftOut, Row

OVERLOAD = 100.0  # a bias that no score outweighs: every token goes to this expert


def _bias(value: np.ndarray, rule: Any) -> np.ndarray:
    """A view of the bias [..., experts] alone, without the rule's memory."""
    return value[..., 0, :] if rule.memory else value


def balance(subject: Subject) -> Iterator[Row]:
    """A step in which every token chooses expert 0 of every router: its bias must fall against the others'."""

    def judge() -> Comparison:
        rules = checkpoint_tree.flatten(subject.base.experiment.abstract_model().buffer_rules)
        before = {path: np.asarray(leaf) for path, leaf in checkpoint_tree.flatten(subject.start["buffers"]).items()}
        biases = [path for path, rule in rules.items() if rule is not keep and path.endswith("router/bias")]
        if not biases:
            raise LeftOut("no router has a selection bias")
        program, lowered = subject.lower(subject.base, subject.batches[0])
        for path in biases:
            before[path] = before[path].copy()
            _bias(before[path], rules[path])[..., 0] = OVERLOAD
        buffers = jax.tree.unflatten(jax.tree.structure(subject.start["buffers"]), list(before.values()))
        state = jax.device_put(subject.start | {"buffers": buffers}, program.shardings)
        allow = jax.device_put(np.bool_(True), subject.base.layout.replicated)
        state, _ = lowered.compile()(state, program.put(subject.batches[0]), allow)
        after = checkpoint_tree.flatten(state["buffers"])
        moves = {path: _bias(np.asarray(after[path]) - before[path], rules[path]) for path in biases}
        # How far the overloaded expert's bias rose against the mean of the others: below zero where it is balanced.
        rises = {path: move[..., 0] - np.mean(move[..., 1:], -1) for path, move in moves.items()}
        wrong = [path for path, rise in rises.items() if not np.all(rise < 0)]
        worst = max(float(np.max(rise)) for rise in rises.values())
        first = f"buffers: {wrong[0]} moves an overloaded expert by {worst:+.3g} against the others" if wrong else None
        return Comparison(worst, 0.0, first)

    yield subject.row("balance", "bias of an overloaded expert, moved against the others'", judge)
