"""The table of a family made concrete for one network: each tensor of the file with the parameters that it holds."""

import dataclasses
import re
from collections.abc import Callable

from maxlike.convert.forms import Flat, Form, Same, Shape, Shifted, Transposed
from maxlike.convert.structure import Cannot, Parameter, Structure

WEIGHT, BIAS, TABLE = Transposed(), Flat(), Same()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A tensor's name in the file, the path or paths of our parameters in it, and its form. `{i}` stands for any layer;
    in the name `{pair}` for half its number (two of our blocks are one layer there), `{ahead}` for its number counted
    on from the layers of the stack, `{e}` for each index of the parameter's first dimension. A rule whose (first)
    parameter is not there does not apply.

    added: name of a [n, D] tensor whose first row is added to each row of this one, where only the sum is a parameter
        here; an export writes two rows of zeros for it.
    where: which layers the rule is for, of those with the parameter: a function of the network and the layer's path.
    form: or a function of the network that gives it, where shapes of other parameters decide.
    """

    name: str
    paths: str | tuple[str, ...]
    form: Form | Callable[[Structure], Form] = WEIGHT
    added: str = ""
    where: Callable[[Structure, str], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter, or the slice of it at `index` of its leading dimensions."""

    parameter: Parameter
    index: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.parameter.shape[len(self.index) :]

    @property
    def padded(self) -> Shape:
        return self.parameter.padded[len(self.index) :]

    @property
    def place(self) -> tuple[int, ...]:
        """The index along the leading dimensions of the array that holds it."""
        return self.parameter.index + self.index


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file; `added` as for Rule."""

    name: str
    slots: tuple[Slot, ...]
    form: Form
    added: str = ""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(slot.shape for slot in self.slots)

    @property
    def shape(self) -> Shape:
        return self.form.shape(self.shapes)

    @property
    def exact(self) -> bool:
        """Whether it is written in float32 whatever the others are: buffers, which training moves by less than half
        precision resolves, and numbers that are not stored as they are here."""
        return isinstance(self.form, Shifted) or any(slot.parameter.buffer for slot in self.slots)


def mixes_by(mixer: str) -> Callable[[Structure, str], bool]:
    """`Rule.where` of the layers whose mixer is of that class."""
    return lambda net, layer: net.value(f"{layer}/mixer") == mixer


def expand(rules: tuple[Rule, ...], net: Structure) -> dict[str, Tensor]:
    """{name in the file: tensor} for a network.

    Raises Cannot for a parameter that no rule names, and for one that is only partly there. A buffer without a rule
    keeps its initial value: other libraries do not know it.
    """
    tensors: dict[str, Tensor] = {}
    named: set[str] = set()
    for rule in rules:
        paths = (rule.paths,) if isinstance(rule.paths, str) else rule.paths
        pattern = re.compile(re.escape(paths[0]).replace(r"\{i\}", r"(?P<i>\d+)"))
        for match in filter(None, map(pattern.fullmatch, net.parameters)):
            layer = match.groupdict()
            if rule.where and not rule.where(net, f"{paths[0].partition('{i}')[0]}{layer['i']}"):
                continue
            each = [path.format(**layer) for path in paths]
            missing = [path for path in each if not net.has(path)]
            if missing:
                raise Cannot(f"the network has {each[0]} without {missing[0]}, which share a tensor of the file")
            if named & set(each):
                raise ValueError(f"two rules of a family name the parameter {each[0]}")
            named.update(each)
            parameters = [net.parameters[path] for path in each]
            form = rule.form(net) if callable(rule.form) else rule.form
            names = layer | ({"pair": int(layer["i"]) // 2} if "i" in layer else {})
            names |= {"ahead": net.depth() + int(layer["i"])} if "{ahead}" in rule.name else {}
            indices = [(e,) for e in range(parameters[0].shape[0])] if "{e}" in rule.name else [()]
            for index in indices:
                name = rule.name.format(**names, **({"e": index[0]} if index else {}))
                slots = tuple(Slot(parameter, index) for parameter in parameters)
                tensors[name] = Tensor(name, slots, form, rule.added)
    left = [path for path, parameter in net.parameters.items() if path not in named and not parameter.buffer]
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise Cannot(f"the family has no name for the parameter {left[0]}{more}")
    return tensors
