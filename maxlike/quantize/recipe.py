"""A recipe: how many bits weights, activations and cache get, and by which method."""

import dataclasses
import functools
from typing import Literal

from maxlike.errors import UserError
from maxlike.quantize.gptq import GPTQ
from maxlike.quantize.grid import Grid, check_bits
from maxlike.quantize.nf4 import NF4
from maxlike.quantize.rtn import RTN

# How each method rounds weights, and what it rotates first.
METHODS = {
    "rtn": ("rtn", "none"),
    "had": ("rtn", "mlp"),
    "gptq": ("gptq", "none"),
    "had_gptq": ("gptq", "mlp"),
    "quarot": ("rtn", "full"),
    "quarot_gptq": ("gptq", "full"),
    "nf4": ("nf4", "none"),
}
Method = Literal["rtn", "had", "gptq", "had_gptq", "quarot", "quarot_gptq", "nf4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which numbers of a network get how many bits; 16 bits leave them as they are.

    weights, activations, cache: bits of the matrices inside the blocks, of their inputs, and of keys and values: 2, 3,
        4, 6, 8 or 16.
    method: "rtn", round to nearest; "had", the same after a Hadamard rotation of each feed-forward's down projection
        (offline on the weight, online on its input); "gptq"; "quarot", RTN in rotated bases throughout (QuaRot, arXiv
        2404.00456): a random rotation of the residual stream with the norms' gains folded away, one of head_dim
        between value and output projection, and that of "had"; "had_gptq" and "quarot_gptq", with GPTQ in RTN's place;
        "nf4", the code book of QLoRA.
    group: inputs that share a scale (a block of NF4, 64 by default), None for all of an output.
    levels, search: see Grid.
    hadamard_blocks: where a width has no Hadamard matrix here, rotate blocks of its largest power-of-two divisor.
    Refuses other bits, and NF4 of other than 4 bits or with levels.
    """

    weights: int = 4
    activations: int = 16
    cache: int = 16
    method: Method = "rtn"
    group: int | None = None
    levels: Literal["symmetric", "asymmetric", "half_step"] = "symmetric"
    search: bool = True
    hadamard_blocks: bool = False

    def __post_init__(self):
        for name in ("weights", "activations", "cache"):
            check_bits(f"Recipe.{name}", dataclasses.asdict(self)[name])
        if self.method not in METHODS:
            raise UserError(f"Recipe.method={self.method!r} must be one of {', '.join(METHODS)}")
        if self.rounding == "nf4" and self.weights not in (4, 16):
            raise UserError(
                f"Recipe.weights={self.weights} with method 'nf4', which has 4 bits: use 4, or another method"
            )
        if self.rounding == "nf4" and self.levels != "symmetric":
            raise UserError(f"Recipe.levels={self.levels!r} with method 'nf4', which has a code book: leave it out")
        self.quantizer()  # refuses

    @property
    def rounding(self) -> str:
        return METHODS[self.method][0]

    @property
    def rotation(self) -> str:
        return METHODS[self.method][1]

    @property
    def needs_hessian(self) -> bool:
        """Whether weights are rounded with the inputs that they meet in mind."""
        return self.weights < 16 and self.rounding == "gptq"

    @property
    def name(self) -> str:
        """Such as w4a4kv4, with the method behind it unless it is RTN."""
        bits = f"w{self.weights}a{self.activations}kv{self.cache}"
        return bits if self.method == "rtn" else f"{bits}_{self.method}"

    def quantizer(self) -> RTN | GPTQ | NF4 | None:
        """What rounds a matrix, the same object each time; None at 16 bits."""
        return _quantizer(self)


@functools.cache
def _quantizer(recipe: Recipe) -> RTN | GPTQ | NF4 | None:
    if recipe.weights == 16:
        return None
    if recipe.rounding == "nf4":
        return NF4(block=64 if recipe.group is None else recipe.group)
    grid = Grid(bits=recipe.weights, levels=recipe.levels, group=recipe.group, search=recipe.search)
    return RTN(grid) if recipe.rounding == "rtn" else GPTQ(grid)
