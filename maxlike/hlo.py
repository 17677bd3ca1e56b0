"""Reading the text of a compiled XLA program: its computations, their calls, and how often its loops run."""

import dataclasses
import functools
import re
from typing import Any

# A loop without a stated trip count is run, with its known scalars alone, up to so many times.
LONGEST_LOOP = 100_000

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_SMALL = re.compile(r"\(|(?:pred|[su]\d+)\[\]")  # types that may hold whole numbers: scalars, and tuples with some
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = type opcode(inside), attributes."""

    name: str
    type: str
    opcode: str
    inside: str
    attributes: str

    @functools.cached_property  # a loop's carry may have thousands
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]
    root: str = ""


@dataclasses.dataclass
class HloModule:
    """The computations of a module by name; `entry` is the one that runs."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "HloModule":
        """Of `jax.stages.Compiled.as_text()`. Raises ValueError for a text without an entry computation."""
        computations, entry, now = {}, "", None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                now = computations[header[2]] = Computation(header[2], {})
                entry = header[2] if header[1] else entry
            elif now is not None and (begin := _INSTRUCTION.match(line)):
                instruction = _instruction(begin[2], line[begin.end() :])
                now.instructions[instruction.name] = instruction
                now.root = instruction.name if begin[1] else now.root
        if not entry:
            raise ValueError("this is no text of a compiled program: no computation is marked ENTRY")
        return cls(computations, entry)

    def loop(self, where: Computation, loop: Instruction, arguments: list[Any]) -> tuple[int | None, Any]:
        """(trip count, what is known of the loop's carry in every iteration) of a `while` in the computation `where`,
        whose parameters are `arguments` (see `value`). The count is None where the text does not determine it."""
        condition, body = (
            self.computations[loop.find(rf"(?:^|, ){part}=%?([\w.\-]+)")] for part in ("condition", "body")
        )
        stated = loop.find(r'"known_trip_count":\{"n":"(\d+)"')
        carry = start = self.value(where, loop.operands[0], arguments)
        if not isinstance(start, tuple):
            return (int(stated) if stated else None), None
        steady = start
        count, longest = 0, 1 if stated else LONGEST_LOOP
        while count < longest:
            goes_on = True if stated else self.value(condition, condition.root, [carry])
            if not goes_on:
                return (None if goes_on is None else count), steady
            carry = self._carry(body, carry)
            steady = tuple(a if a == b else None for a, b in zip(steady, carry, strict=True))
            count += 1
        return (int(stated) if stated else None), steady

    def _carry(self, body: Computation, carry: tuple) -> tuple:
        """The carry after one iteration, as far as it is known; what is unknown stays so."""
        after = self.value(body, body.root, [carry])
        if not isinstance(after, tuple):
            return (None,) * len(carry)
        return tuple(None if old is None else new for old, new in zip(carry, after, strict=True))

    def value(self, where: Computation, name: str, arguments: list[Any]) -> Any:
        """The value of an instruction as far as whole numbers go: int, bool, a tuple of values, or None for unknown.
        `arguments`: values of the computation's parameters."""
        return self._value(where, name, arguments, {})

    def _value(self, where: Computation, name: str, arguments: list[Any], known: dict[str, Any]) -> Any:
        """`known`: values found so far with these arguments."""
        if name not in known:
            instruction = where.instructions[name]
            known[name] = (
                self._compute(where, instruction, arguments, known) if _SMALL.match(instruction.type) else None
            )
        return known[name]

    def _compute(
        self, where: Computation, instruction: Instruction, arguments: list[Any], known: dict[str, Any]
    ) -> Any:
        def operand(i: int) -> Any:
            return self._value(where, instruction.operands[i], arguments, known)

        match instruction.opcode:
            case "constant":
                return _constant(instruction.inside)
            case "parameter":
                index = int(instruction.inside)
                return arguments[index] if index < len(arguments) else None
            case "get-tuple-element":
                whole = operand(0)
                return whole[int(instruction.find(r"index=(\d+)"))] if isinstance(whole, tuple) else None
            case "tuple":
                return tuple(operand(i) for i in range(len(instruction.operands)))
            case "copy" | "convert" | "bitcast" | "reshape" | "opt-barrier" | "copy-start" | "copy-done":
                return operand(0)
            case "fusion" | "call":
                called = self.computations[instruction.find(r"(?:^|, )(?:calls|to_apply)=%?([\w.\-]+)")]
                inner = [operand(i) for i in range(len(instruction.operands))]
                return self.value(called, called.root, inner)
            case opcode if opcode in _ARITHMETIC:
                a, b = operand(0), operand(1)
                return None if a is None or b is None else _ARITHMETIC[opcode](a, b)
            case "compare":
                a, b = operand(0), operand(1)
                return None if a is None or b is None else _COMPARISONS[instruction.find(r"direction=(\w+)")](a, b)
        return None


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
}
_COMPARISONS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _instruction(name: str, rest: str) -> Instruction:
    """Of the text behind `name = `."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    close = _closing(rest, opcode.end() - 1)
    return Instruction(name, rest[:end], opcode[1], rest[opcode.end() : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses in a program's text: {text[:120]}")


def _constant(text: str) -> int | bool | None:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?\d+", text) else None
