"""What a gin value is, and whether the annotation of a knob admits it."""

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/module.Name` (a factory) or `@scope/module.Name()` (a value made at use)."""

    scope: str
    target: Callable
    evaluate: bool
    name: str

    def __repr__(self) -> str:
        return f"@{self.name}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%name`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


def parameters(target: Callable) -> list[str]:
    """Names a gin file may bind: the keyword parameters of a constructor or a function, without `rngs`."""
    parameters = list(inspect.signature(_function(target)).parameters.values())
    keywords = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [name for name in keywords if name not in ("self", "rngs")]


def _function(target: Callable) -> Callable:
    """The constructor of a class (a metaclass may hide its signature), or the function itself."""
    return target.__init__ if inspect.isclass(target) else target


def hints(target: Callable) -> dict[str, Any]:
    return typing.get_type_hints(_function(target))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple) and not isinstance(value, Reference | Macro):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def resolved(value: Any, macros: dict[str, Any]) -> Any:
    if isinstance(value, Macro):
        return resolved(macros[value.name].value, macros)
    if isinstance(value, dict):
        return {resolved(k, macros): resolved(v, macros) for k, v in value.items()}
    if isinstance(value, list):
        return [resolved(v, macros) for v in value]
    if isinstance(value, tuple):
        return tuple(resolved(v, macros) for v in value)
    return value


def admits(hint: Any, value: Any) -> bool:
    """Whether an annotation admits a gin value. What cannot be known before the call is admitted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Reference):
        return _admits_reference(hint, origin, arguments, value)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(admits(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(admits(arguments[0], v) for v in value)
        return len(value) == len(arguments) and all(admits(a, v) for a, v in zip(arguments, value, strict=True))
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, tuple | list) and all(admits(arguments[0], v) for v in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            admits(arguments[0], k) and admits(arguments[1], v) for k, v in value.items()
        )
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is tuple:
        return isinstance(value, tuple | list)
    if inspect.isclass(hint):
        return isinstance(value, hint) if not _is_protocol(hint) else not isinstance(value, int | float | str | bool)
    return origin is not collections.abc.Callable


def _admits_reference(hint: Any, origin: Any, arguments: tuple, value: Reference) -> bool:
    if origin in (typing.Union, types.UnionType):
        return any(_admits_reference(a, typing.get_origin(a), typing.get_args(a), value) for a in arguments)
    if value.evaluate:  # its result is known only at the call
        return hint is not type(None) and origin is not typing.Literal
    scalar = hint in (int, float, str, bool, type(None)) or origin in (typing.Literal, tuple, list, dict)
    return not scalar


def _is_protocol(hint: type) -> bool:
    return typing.is_protocol(hint) if hasattr(typing, "is_protocol") else bool(vars(hint).get("_is_protocol", False))


def spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(a) for a in arguments)
    if hint is type(None) or hint is None:
        return "None"
    if origin is collections.abc.Callable:
        return "a class or a function (`@module.Class`)"
    return hint.__name__ if inspect.isclass(hint) and origin is None else str(hint).replace("typing.", "")


def spell_value(value: Any) -> str:
    return repr(value) if isinstance(value, Reference) else f"{value!r} ({type(value).__name__})"
