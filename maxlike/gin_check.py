"""Reads gin files before gin does, and refuses what gin would let pass or would report badly.

gin accepts a value of any type, is silent about a binding that nothing uses, and names no alternatives. This module
walks the same statements with gin's own parser, resolves every name through the file's imports, compares values with
the annotations of the constructors they are bound to, and keeps where each binding stands.
"""

import dataclasses
import importlib
import importlib.util
import pathlib
import pkgutil
import tokenize
from collections.abc import Callable
from typing import Any

from gin import config_parser

from maxlike.catalog import nearest
from maxlike.errors import UserError
from maxlike.gin_values import Macro, Reference, admits, hints, leaves, parameters, resolved, spell, spell_value


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


def _strongest(bindings: list[Binding], scope: str) -> Binding | None:
    """Of bindings of one knob the one that counts in a scope: the longest that the scope begins with."""
    inside = [b for b in bindings if not b.scope or f"{scope}/".startswith(f"{b.scope}/")]
    return max(inside, key=lambda b: len(b.scope), default=None)


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
        knobs = parameters(target)
        if statement.arg_name not in knobs:
            raise UserError(
                f"{where}: {statement.selector} has no knob {statement.arg_name!r}"
                f"{nearest(statement.arg_name, knobs)}; it has {', '.join(sorted(knobs)) or 'none'}"
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
            for value in leaves(binding.value):
                if isinstance(value, Macro) and value.name not in macros:
                    raise UserError(
                        f"{binding.where}: nothing defines the macro %{value.name}{nearest(value.name, macros)}"
                    )
            if binding.target is None:
                continue
            hint = hints(binding.target).get(binding.argument, Any)
            value = resolved(binding.value, macros)
            if not admits(hint, value):
                raise UserError(
                    f"{binding.where}: {binding.target.__name__}.{binding.argument} takes {spell(hint)}, "
                    f"got {spell_value(value)}"
                )

    def unused(self, used: set[tuple[str, Callable, str]]) -> list[Binding]:
        """Bindings that took no part in what was built.

        `used` holds (scope, target, argument) of gin's operative configuration. A binding counts as used in its own
        scope or any scope inside it; one of the command line only where no binding of a longer scope hides it, for who
        writes it means it to change something. A macro counts where anything mentions it, and so does a binding of a
        class that a later binding replaced (`--set experiment.Experiment.optimizer=@adamw.AdamW()` leaves Muon's knobs
        behind).
        """
        effective = self.effective()
        mentioned = {v.name for b in self.bindings for v in leaves(b.value) if isinstance(v, Macro)}
        replaced = self._replaced()
        idle = []
        for binding in effective.values():
            if binding.target is None:
                if binding.argument not in mentioned and binding.argument != "job":
                    idle.append(binding)
                continue
            same = [b for b in effective.values() if (b.target, b.argument) == (binding.target, binding.argument)]
            rivals = same if binding.where.startswith("--set") else [binding]
            seen = any(
                target is binding.target and argument == binding.argument and _strongest(rivals, scope) is binding
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
            for v in leaves(b.value)
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
                for v in leaves(b.value)
                if isinstance(v, Reference)
            ]
        return found


def _siblings(package: str) -> list[str]:
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)]
