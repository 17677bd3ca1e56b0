"""The matrices of a network that are quantized, and in which basis; what is not, and why; what cannot be."""

import dataclasses
import math
from typing import Any

from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.experts import Experts
from layers.linear import Linear
from layers.mla import MLA
from layers.mlp import MLP, GatedMLP
from layers.norm import Identity, RMSNorm
from layers.parts import named_parts, parts
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.quantize.hadamard import Rotation, divisor, rotation
from maxlike.quantize.recipe import Recipe

# Products whose result picks something: rounding would flip the choice.
DECIDING = ("vocab", "experts", "routed", "auxiliary")
SIGNS = 0  # seed of the signs of the residual stream's rotation


@dataclasses.dataclass(frozen=True)
class Target:
    """A matrix inside the blocks, [inputs, outputs], or several of them, of layers or experts that are stacked.

    path: of its parameter. It is quantized as A^T W B, with A = `enters` and B = `leaves` (None: the identity), and
    turned back, so that the network around it stays as it was: x W = (x A) (A^T W B) B^T. Quantized so are the weights
    of a network whose residual stream (or feed-forward, or values) had been rotated offline.
    """

    path: str
    inputs: int
    outputs: int
    enters: Rotation | None
    leaves: Rotation | None

    @property
    def layer(self) -> str:
        """The module's path."""
        return self.path.rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Targets:
    """matrices: by path. kept: parameter inside the blocks -> why it stays in 16 bits."""

    matrices: dict[str, Target]
    kept: dict[str, str]


def find(network: Any, recipe: Recipe) -> Targets:
    """What of an (abstract) network a recipe quantizes. Raises UserError, naming the layer, for what it cannot."""
    if not parts(network, Stack):
        raise UserError(f"{type(network).__name__} has no stack of blocks: there is nothing that is quantized here")
    if recipe.rotation == "full":
        _refuse_rotation(network)
    values = {id(attention.value) for attention in parts(network, Attention)}
    matrices, kept = {}, {}
    for layer, part in inside(network, (Linear, Experts)).items():
        for name, kernel in _matrices(part).items():
            path, why = f"{layer}/{name}", deciding(part)
            if why is None:
                try:
                    matrices[path] = _target(recipe, path, part, kernel, id(part) in values)
                except UserError as error:
                    raise UserError(f"{layer}: {error}") from None
            else:
                kept[path] = why
    _check(recipe, matrices, network)
    return Targets(matrices, kept)


def _target(recipe: Recipe, path: str, part: Linear | Experts, kernel: nnx.Param, value: bool) -> Target:
    axes = logical(kernel)
    shape = kernel.shape[kernel.ndim - len(axes) :]
    dims = part.input_dims if isinstance(part, Linear) else 1
    return Target(
        path,
        math.prod(shape[:dims]),
        math.prod(shape[dims:]),
        reading(recipe, axes[:dims], shape[:dims]),
        _writing(recipe, axes[dims:], shape[dims:], value),
    )


def inside(network: Any, kind: type | tuple[type, ...]) -> dict[str, Any]:
    """{path: module} of a kind in the blocks of the network's stacks."""
    roots = tuple(f"{path}/" for path in named_parts(network, Stack))
    return {path: part for path, part in named_parts(network, kind).items() if path.startswith(roots)}


def logical(kernel: nnx.Param) -> tuple[str, ...]:
    """The logical axes of one matrix, without those that layers or experts are stacked along."""
    return tuple(axis for axis in kernel.get_metadata("axes") if axis not in ("layers", "experts"))


def deciding(part: Linear | Experts) -> str | None:
    """Why a layer inside the blocks stays in 16 bits, its input too; None where it does not."""
    if isinstance(part, Experts):
        return None
    axes = part.kernel.get_metadata("axes")
    found = [axis for axis in axes if axis in DECIDING]
    if found:
        return f"decides on {found[0]}"
    if axes[-1] in ("heads", "kv_heads"):
        return "one number a head: a rate or a gate"
    return None


def reading(recipe: Recipe, axes: tuple[str, ...], shape: tuple[int, ...]) -> Rotation | None:
    """The rotation of a layer's input, by the logical axes of that side; it is the input's last dimension's."""
    if recipe.rotation != "none" and axes == ("mlp",):
        return _hadamard(recipe, shape[0])
    if recipe.rotation == "full" and axes == ("embed",):
        return _hadamard(recipe, shape[0], seed=SIGNS)
    if recipe.rotation == "full" and axes == ("heads", "head_dim"):
        return _per_head(recipe, shape)
    return None


def of_heads(recipe: Recipe, head_dim: int, layer: str) -> Rotation:
    """The rotation of head_dim in which keys are cached, and with QuaRot values."""
    try:
        return _hadamard(recipe, head_dim)
    except UserError as error:
        raise UserError(f"{layer}: {error}") from None


def _writing(recipe: Recipe, axes: tuple[str, ...], shape: tuple[int, ...], value: bool) -> Rotation | None:
    if recipe.rotation == "full" and axes == ("embed",):
        return _hadamard(recipe, shape[0], seed=SIGNS)
    return _per_head(recipe, shape) if recipe.rotation == "full" and value else None


def _hadamard(recipe: Recipe, size: int, seed: int | None = None) -> Rotation:
    try:
        return rotation(size, None, seed)
    except UserError:
        if not recipe.hadamard_blocks or divisor(size) == 1:  # blocks of one channel rotate nothing
            raise
        return rotation(size, divisor(size), seed)


def _per_head(recipe: Recipe, shape: tuple[int, ...]) -> Rotation:
    return rotation(math.prod(shape), _hadamard(recipe, shape[-1]).block, None)


def _matrices(part: Linear | Experts) -> dict[str, nnx.Param]:
    if isinstance(part, Linear):
        return {"kernel": part.kernel}
    return {"gate": part.gate, "up": part.up, "down": part.down}


def _check(recipe: Recipe, matrices: dict[str, Target], network: Any) -> None:
    quantizer = recipe.quantizer()
    for target in matrices.values() if quantizer is not None else ():
        quantizer.check(target.inputs, target.outputs, target.layer)
    experts = next(iter(inside(network, Experts)), None)
    if experts is not None and recipe.needs_hessian:
        raise UserError(
            f"{experts}: each expert meets inputs of its own, whose Hessians are not collected: use the method "
            "rtn, had or nf4"
        )
    if experts is not None and recipe.activations < 16:
        raise UserError(f"{experts}: inputs of experts are not quantized here: leave the activations in 16 bits")
    if recipe.cache == 16:
        return
    attentions, latent = inside(network, Attention), next(iter(inside(network, MLA)), None)
    if latent is not None:
        raise UserError(f"{latent}: MLA caches latents, which are not quantized here: leave the cache in 16 bits")
    for path, block in inside(network, Block).items():
        if f"{path}/mixer" not in attentions:
            raise UserError(
                f"{path}/mixer: the cache of {type(block.mixer).__name__} is not quantized here, only keys and values "
                "of Attention are: leave the cache in 16 bits"
            )
    if not attentions:
        raise UserError("no layer here caches keys and values: leave the cache in 16 bits")
    for path, attention in attentions.items():
        of_heads(recipe, attention.head_dim, path)


def _refuse_rotation(network: Any) -> None:
    """QuaRot holds for what a rotation passes through unchanged."""
    blocks = inside(network, Block)
    for path in inside(network, (Linear, Experts)):
        if not any(path.startswith(f"{block}/") for block in blocks):
            raise UserError(f"{path}: quarot rotates plain blocks of attention and feed-forward: use had or rtn")
    for path, block in blocks.items():
        wrong = None
        if block.order != "pre":
            wrong = f"its order is {block.order!r}, and only a norm at the beginning of a branch leaves it rotated"
        elif type(block.mixer) is not Attention or block.mixer.gate is not None:
            wrong = "its mixer is no plain Attention without a gate"
        elif not (block.ffn is None or isinstance(block.ffn, MLP | GatedMLP)):
            wrong = f"its feed-forward is {type(block.ffn).__name__}, not a dense one"
        elif not all(isinstance(norm, RMSNorm | Identity) for norm in (block.mixer_norm, block.ffn_norm) if norm):
            wrong = "a norm that subtracts the mean is not that of the rotated vector"
        if wrong is not None:
            raise UserError(f"{path}: quarot cannot rotate this block ({wrong}): use had or rtn")
