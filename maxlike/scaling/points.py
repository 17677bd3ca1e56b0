"""The points of a sweep: lists of values of knobs, combined each with each or side by side."""

from collections.abc import Callable
from typing import Any

from maxlike.errors import UserError

Point = dict[str, Any]  # knob -> value


class Product:
    """Every value with every other: {'steps': (100, 200), 'adamw.AdamW.b2': (0.95, 0.99)} are four points.

    knobs: {what `--set` takes, a macro or `module.Class.knob`: its values}; a text that begins with @ or % is a gin
        reference, '@adamw.AdamW()'. parts: further Products and Zips, whose points are combined in the same way.
    The first knob varies slowest. Refuses lists without values, a knob that is in two parts, and the same point twice.
    """

    def __init__(self, *, knobs: dict[str, tuple] | None = None, parts: tuple[Callable, ...] = ()):
        self.factors = _factors(type(self).__name__, knobs, parts)
        combined: list[Point] = [{}]
        for factor in self.factors:
            combined = [before | point for before in combined for point in factor]
        self.points = _distinct(type(self).__name__, combined)


class Zip:
    """The first values together, the second ones together, ...: {'dim': (64, 128), 'heads': (2, 4)} are two points.

    knobs, parts: see Product. Refuses lists of different lengths, and what Product refuses.
    """

    def __init__(self, *, knobs: dict[str, tuple] | None = None, parts: tuple[Callable, ...] = ()):
        self.factors = _factors(type(self).__name__, knobs, parts)
        lengths = [len(factor) for factor in self.factors]
        if len(set(lengths)) > 1:
            sizes = ", ".join(f"{' and '.join(factor[0])} {len(factor)}" for factor in self.factors)
            raise UserError(f"Zip needs lists of the same length, and these have: {sizes}; correct them or use Product")
        combined = [{knob: value for point in row for knob, value in point.items()} for row in zip(*self.factors)]
        self.points = _distinct(type(self).__name__, combined)


def _factors(owner: str, knobs: dict[str, tuple] | None, parts: tuple) -> list[list[Point]]:
    """The points of each list and each part. Raises UserError where one is empty, or two name the same knob."""
    factors: list[list[Point]] = []
    for knob, values in (knobs or {}).items():
        if not values:
            raise UserError(f"{owner}.knobs: {knob} has no values; give at least one")
        factors.append([{knob: _plain(owner, knob, value)} for value in values])
    factors += [list(part.points) for part in parts]
    if not factors:
        raise UserError(f"{owner} has neither knobs nor parts, so it has no points: give it one of them")
    names = [knob for factor in factors for knob in factor[0]]
    twice = [knob for knob in names if names.count(knob) > 1]
    if twice:
        raise UserError(f"{owner}: {twice[0]} has values in two places; leave one of them out")
    return factors


def _plain(owner: str, knob: str, value: Any) -> Any:
    whole = value if isinstance(value, tuple | list) else (value,)
    if any(not isinstance(part, str | int | float | bool | type(None)) for part in whole):
        raise UserError(
            f"{owner}.knobs: {knob} has the value {value!r}, and a point is written with numbers, texts, True, False, "
            "None and tuples of them; name a class as text, '@module.Class'"
        )
    return tuple(value) if isinstance(value, list) else value


def _distinct(owner: str, points: list[Point]) -> list[Point]:
    for index, point in enumerate(points):
        if point in points[:index]:
            raise UserError(f"{owner} has the point {point} twice: give each value once")
    return points


def binding(knob: str, value: Any) -> str:
    """The value as one line of gin, as `--set` takes it."""
    return f"{knob} = {value if isinstance(value, str) and value[:1] in ('@', '%') else repr(value)}"


def short_names(knobs: list[str]) -> dict[str, str]:
    """knob -> its last part, or as many of its last parts as tell it from the others."""
    names = {}
    for knob in knobs:
        parts = knob.replace("/", ".").split(".")
        tails = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [other.replace("/", ".") for other in knobs if other != knob]
        names[knob] = next((t for t in tails if not any(f".{other}".endswith(f".{t}") for other in others)), knob)
    return names
