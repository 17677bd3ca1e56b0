"""Reads gin files before gin does, and refuses what gin would let pass or would report badly.

gin accepts a value of any type, is silent about a binding that nothing uses, and names no alternatives. This module
walks the same statements with gin's own parser, resolves every name through the file's imports, compares values with
the annotations of the constructors they are bound to, and keeps where each binding stands.
"""

import collections.abc
import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from gin import config_parser

from maxlike.catalog import nearest
from maxlike.errors import UserError


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


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """One `scope/module.Name.argument = value`; a macro has no target. `where` is file:line, `left` what stands before
    the equals sign."""

    scope: str
    target: Callable | None
    argument: str
    value: Any
    where: str
    left: str

    @property
    def text(self) -> str:
        """The binding as one line of gin."""
        return f"{self.left} = {self.value!r}"

    @property
    def key(self) -> tuple[str, Callable | None, str]:
        return self.scope, self.target, self.argument


class _Names(config_parser.ParserDelegate):
    """Resolves references while a file is parsed."""

    def __init__(self, text: str, origin: str, symbols: dict[str, Any]):
        self.origin = origin
        self.symbols = symbols
        self.parser = None
        self.parser = config_parser.ConfigParser(text, self)

    @property
    def where(self) -> str:
        return self.at(self.parser.current_token.start[0])

    def at(self, line: int) -> str:
        return self.origin if self.origin.startswith("--") else f"{self.origin}:{line}"

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, self.resolve(selector), evaluate, scoped_configurable_name)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)

    def resolve(self, selector: str) -> Callable:
        """The class or function a dotted name stands for, refused with the nearest name where there is none."""
        first, *rest = selector.split(".")
        if first not in self.symbols:
            raise UserError(
                f"{self.where}: {first!r} is not imported{nearest(first, self.symbols)}; "
                f"a gin file imports what it binds (`from layers import {first}`)"
            )
        value = self.symbols[first]
        for depth, name in enumerate(rest):
            if not hasattr(value, name):
                owner = ".".join([first, *rest[:depth]])
                public = [n for n in dir(value) if not n.startswith("_")]
                raise UserError(f"{self.where}: {owner} has no {name!r}{nearest(name, public)}")
            value = getattr(value, name)
        if not callable(value):
            raise UserError(f"{self.where}: {selector} is not a class or a function, so it has nothing to bind")
        return value


class Check:
    """Every binding of a list of gin files and of bindings given as text, in order of reading."""

    def __init__(self, roots: list[pathlib.Path]):
        self.roots = roots
        self.bindings: list[Binding] = []
        self.symbols: dict[str, Any] = {}
        self.imports: list[str] = []

    def read_file(self, path: pathlib.Path) -> None:
        text = path.read_text()
        if "from __gin__ import dynamic_registration" not in text:
            raise UserError(f"{path}:1: the file must begin with `from __gin__ import dynamic_registration`")
        self._read(text, str(path), {})

    def read_text(self, text: str, origin: str) -> None:
        """Bindings from outside a file: they may use every name that the files imported."""
        self._read(text, origin, dict(self.symbols))

    def read_text_as_file(self, text: str, origin: str = "operative configuration") -> None:
        """A whole configuration as text, with its own imports."""
        self._read(text, origin, {})

    def _read(self, text: str, origin: str, symbols: dict[str, Any]) -> None:
        names = _Names(text, origin, symbols)
        while (statement := self._next(names, text)) is not None:
            where = names.at(statement.location.line_num)
            if isinstance(statement, config_parser.ImportStatement):
                self._import(statement, names, where)
            elif isinstance(statement, config_parser.IncludeStatement):
                self.read_file(self._included(statement.filename, where))
            elif isinstance(statement, config_parser.BindingStatement):
                self._bind(statement, names, where)

    def _next(self, names: _Names, text: str) -> Any:
        try:
            return names.parser.parse_statement()
        except UserError as error:  # raised by a name; gin adds where it was reading, which the sentence says already
            raise UserError(str(error).split("\n")[0]) from None
        except (SyntaxError, tokenize.TokenError) as error:
            line = getattr(error, "lineno", None) or names.parser.current_token.start[0]
            content = text.splitlines()[line - 1].strip()
            raise UserError(
                f"{names.at(line)}: `{content}` is not a gin statement; "
                "write `module.Class.knob = value`, with strings in quotes"
            ) from None

    def _import(self, statement: config_parser.ImportStatement, names: _Names, where: str) -> None:
        if statement.module.startswith("__gin__"):
            return
        try:
            module = importlib.import_module(statement.module)
        except ModuleNotFoundError as error:
            package = statement.module.rpartition(".")[0]
            siblings = _siblings(package)
            short = statement.module.rpartition(".")[2]
            if error.name is not None and not statement.module.startswith(error.name):
                raise  # a module that exists needs one that does not: its traceback is worth more than a sentence
            raise UserError(f"{where}: there is no module {statement.module!r}{nearest(short, siblings)}") from None
        if not statement.is_from and not statement.alias:
            module = importlib.import_module(statement.module.partition(".")[0])
        if self.symbols.get(statement.bound_name(), module) is not module:
            raise UserError(
                f"{where}: {statement.bound_name()!r} already names another module here; write `... as another_name`"
            )
        names.symbols[statement.bound_name()] = module
        self.symbols[statement.bound_name()] = module
        if statement.format() not in self.imports:
            self.imports.append(statement.format())

    def _included(self, name: str, where: str) -> pathlib.Path:
        for folder in [pathlib.Path(), *self.roots]:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"{where}: the included file {name!r} is neither here nor under experiments/")

    def _bind(self, statement: config_parser.BindingStatement, names: _Names, where: str) -> None:
        if not statement.arg_name:  # a macro
            name = f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector
            self.bindings.append(Binding("", None, name, statement.value, where, name))
            return
        target = names.resolve(statement.selector)
        parameters = _parameters(target)
        if statement.arg_name not in parameters:
            raise UserError(
                f"{where}: {statement.selector} has no knob {statement.arg_name!r}"
                f"{nearest(statement.arg_name, parameters)}; it has {', '.join(sorted(parameters)) or 'none'}"
            )
        scope = f"{statement.scope}/" if statement.scope else ""
        left = f"{scope}{statement.selector}.{statement.arg_name}"
        self.bindings.append(Binding(statement.scope, target, statement.arg_name, statement.value, where, left))

    def effective(self) -> dict[tuple, Binding]:
        """The last binding of each key: the ones that count."""
        return {binding.key: binding for binding in self.bindings}

    def check_types(self) -> None:
        """Refuses a value that the annotation of its knob does not admit, and a macro nobody defines."""
        macros = {b.argument: b for b in self.bindings if b.target is None}
        for binding in self.effective().values():
            for value in _leaves(binding.value):
                if isinstance(value, Macro) and value.name not in macros:
                    raise UserError(
                        f"{binding.where}: nothing defines the macro %{value.name}{nearest(value.name, macros)}"
                    )
            if binding.target is None:
                continue
            hint = _hints(binding.target).get(binding.argument, Any)
            value = _resolved(binding.value, macros)
            if not _admits(hint, value):
                raise UserError(
                    f"{binding.where}: {binding.target.__name__}.{binding.argument} takes {_spell(hint)}, "
                    f"got {_spell_value(value)}"
                )

    def unused(self, used: set[tuple[str, Callable, str]]) -> list[Binding]:
        """Bindings that took no part in what was built.

        `used` holds (scope, target, argument) of gin's operative configuration. A binding counts as used in its own
        scope or any scope inside it. A macro counts where anything mentions it, and so does a binding of a class that a
        later binding replaced (`--set experiment.Experiment.optimizer=@adamw.AdamW()` leaves Muon's knobs behind).
        """
        effective = self.effective()
        mentioned = {v.name for b in self.bindings for v in _leaves(b.value) if isinstance(v, Macro)}
        replaced = self._replaced()
        idle = []
        for binding in effective.values():
            if binding.target is None:
                if binding.argument not in mentioned and binding.argument != "job":
                    idle.append(binding)
                continue
            prefix = f"{binding.scope}/" if binding.scope else ""
            seen = any(
                target is binding.target and argument == binding.argument and f"{scope}/".startswith(prefix)
                for scope, target, argument in used
            )
            if not seen and binding.target not in replaced:
                idle.append(binding)
        return idle

    def _replaced(self) -> set[Callable]:
        """Classes that an overridden binding mentions, and all that hangs on them."""
        effective = {id(binding) for binding in self.effective().values()}
        frontier = [
            v.target
            for b in self.bindings
            if id(b) not in effective
            for v in _leaves(b.value)
            if isinstance(v, Reference)
        ]
        found: set[Callable] = set()
        while frontier:
            target = frontier.pop()
            if target in found:
                continue
            found.add(target)
            frontier += [
                v.target
                for b in self.bindings
                if b.target is target
                for v in _leaves(b.value)
                if isinstance(v, Reference)
            ]
        return found


def _siblings(package: str) -> list[str]:
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]


def _parameters(target: Callable) -> list[str]:
    """Names a gin file may bind: the keyword parameters of a constructor or a function, without `rngs`."""
    parameters = list(inspect.signature(_function(target)).parameters.values())
    keywords = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [name for name in keywords if name not in ("self", "rngs")]


def _function(target: Callable) -> Callable:
    """The constructor of a class (a metaclass may hide its signature), or the function itself."""
    return target.__init__ if inspect.isclass(target) else target


def _hints(target: Callable) -> dict[str, Any]:
    return typing.get_type_hints(_function(target))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple) and not isinstance(value, Reference | Macro):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _resolved(value: Any, macros: dict[str, Binding]) -> Any:
    if isinstance(value, Macro):
        return _resolved(macros[value.name].value, macros)
    if isinstance(value, dict):
        return {_resolved(k, macros): _resolved(v, macros) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, macros) for v in value]
    if isinstance(value, tuple):
        return tuple(_resolved(v, macros) for v in value)
    return value


def _admits(hint: Any, value: Any) -> bool:
    """Whether an annotation admits a gin value. What cannot be known before the call is admitted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Reference):
        return _admits_reference(hint, origin, arguments, value)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_admits(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in arguments)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_admits(arguments[0], v) for v in value)
        return len(value) == len(arguments) and all(_admits(a, v) for a, v in zip(arguments, value, strict=True))
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, tuple | list) and all(_admits(arguments[0], v) for v in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            _admits(arguments[0], k) and _admits(arguments[1], v) for k, v in value.items()
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


def _spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in arguments)
    if hint is type(None) or hint is None:
        return "None"
    if origin is collections.abc.Callable:
        return "a class or a function (`@module.Class`)"
    return hint.__name__ if inspect.isclass(hint) and origin is None else str(hint).replace("typing.", "")


def _spell_value(value: Any) -> str:
    return repr(value) if isinstance(value, Reference) else f"{value!r} ({type(value).__name__})"
