"""Modules that predict further ahead (`layers.multi_token`) in the files of others: each is one layer more."""

import dataclasses
import functools
from collections.abc import Callable

from layers.multi_token import MultiToken
from maxlike.convert import decoder
from maxlike.convert.forms import Flat, Form
from maxlike.convert.structure import Structure
from maxlike.convert.tensors import BIAS, Rule

STEP = "mtp/steps/{i}/"
DEPTH = "num_nextn_predict_layers"  # of config.json


def rules(layer: tuple[Rule, ...], theirs: str, names: dict[str, str], gain: Form | Flat = BIAS) -> tuple[Rule, ...]:
    """Rules of the modules. layer: those of a layer, which the module's block has too, with the prefix `theirs`.

    names: of the matrix that joins ("join"; the embedding's columns come first in all files, as here) and the three
    norms ("embed", "hidden", "final"). gain: the form of the norms' gains.
    """
    own = (
        Rule(names["join"], f"{STEP}join/kernel"),
        Rule(names["embed"], f"{STEP}embed_norm/gain", gain),
        Rule(names["hidden"], f"{STEP}hidden_norm/gain", gain),
        Rule(names["final"], f"{STEP}norm/gain", gain),
    )
    return own + tuple(_in_step(rule, theirs) for rule in layer if _paths(rule)[0].startswith(decoder.OURS))


def modules(block: Callable, norm: Callable, depth: int = 1) -> Callable:
    """The factory for `LanguageModel.mtp`."""
    return functools.partial(MultiToken, block=block, norm=norm, depth=depth)


def count(net: Structure) -> int:
    """How many modules a network has."""
    steps = 0
    while net.has(f"mtp/steps/{steps}/join/kernel"):
        steps += 1
    return steps


def _paths(rule: Rule) -> tuple[str, ...]:
    return (rule.paths,) if isinstance(rule.paths, str) else rule.paths


def _in_step(rule: Rule, theirs: str) -> Rule:
    name = rule.name.replace(decoder.LAYER, theirs, 1)
    paths = tuple(path.replace(decoder.OURS, f"{STEP}block/", 1) for path in _paths(rule))
    where = None if rule.where is None else functools.partial(_of_block, rule.where)
    return dataclasses.replace(rule, name=name, paths=paths, where=where)


def _of_block(where: Callable[[Structure, str], bool], net: Structure, step: str) -> bool:
    """`Rule.where`, which is asked for a step, asks for the step's block."""
    return where(net, f"{step}/block")
