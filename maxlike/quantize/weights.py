"""Quantized weights in place of a network's: matrix by matrix, or with the inputs that each meets in mind."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layers.block import Block
from maxlike import checkpoint_tree
from maxlike.experiment import Experiment
from maxlike.quantize import targets
from maxlike.quantize.calibrate import Calibration, in_order
from maxlike.quantize.grid import Quantized
from maxlike.quantize.hadamard import Rotation
from maxlike.quantize.recipe import Recipe
from maxlike.quantize.targets import Target, Targets


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized parameter: [N, I, O] with N layers and experts stacked, or 1.

    bits: a weight costs, scales included. errors_N: |W - Q|^2 / |W|^2 of each. codes, scales, zeros: in the basis in
    which the matrix was rounded, see Target and Quantized. damp: the largest that a Hessian was damped with, None
    without any.
    """

    target: Target
    bits: float
    errors_N: jax.Array
    codes_NIO: jax.Array
    scales_NGO: jax.Array
    zeros_NGO: jax.Array | None
    damp: float | None


@dataclasses.dataclass(frozen=True)
class Weights:
    """params: the tree with quantized matrices, float32 numbers of few values, in the basis that they had.
    matrices: what was quantized. kept: parameter -> why not."""

    params: dict
    matrices: list[Matrix]
    kept: dict[str, str]


def quantize(
    experiment: Experiment,
    params: dict,
    buffers: dict,
    recipe: Recipe,
    calibration: Calibration | None = None,
    say: Callable[[str], None] = print,
) -> Weights:
    """`params` with the matrices inside the blocks quantized; embedding, head, norms and biases stay as they are.

    calibration: the rows that Hessians are collected over, for GPTQ. say: told what a reader should know.
    Raises UserError, naming the layer, for a network that the recipe cannot take.
    """
    network = experiment.bare()
    found = targets.find(network, recipe)
    flat = checkpoint_tree.flatten(params)
    if recipe.rotation == "full":
        flat = fold_gains(network, flat)
    structure = jax.tree.structure(params)
    if recipe.weights == 16:
        return Weights(jax.tree.unflatten(structure, list(flat.values())), [], found.kept)
    if recipe.needs_hessian:
        tree = jax.tree.unflatten(structure, list(flat.values()))
        matrices, changed = _calibrated(experiment, tree, buffers, recipe, found, calibration, say)
    else:
        matrices, changed = _alone(recipe, found, flat)
    placed = {path: jax.device_put(new, flat[path].sharding) for path, new in changed.items()}
    return Weights(jax.tree.unflatten(structure, list((flat | placed).values())), matrices, found.kept)


def fold_gains(network: Any, flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gains of the norms before attention and feed-forward multiplied into the matrices that read them, and set to 1:
    the same function, whose normed vectors a rotation leaves normed. A single gain for all channels (arXiv 2506.19697)
    commutes with it and stays."""
    flat = dict(flat)
    for path, block in targets.inside(network, Block).items():
        readers = {"mixer_norm": ("mixer/query", "mixer/key", "mixer/value")}
        if block.ffn is not None:
            readers["ffn_norm"] = tuple(f"ffn/{name}" for name in ("gate", "up") if f"{path}/ffn/{name}/kernel" in flat)
        for norm, names in readers.items():
            gain = flat.get(f"{path}/{norm}/gain")
            kernels = [f"{path}/{name}/kernel" for name in names]
            stacked = "periods" in path.split("/")
            if gain is None or gain.ndim == int(stacked):
                continue
            for kernel in kernels:
                spread = jnp.reshape(gain, (*gain.shape, *[1] * (flat[kernel].ndim - gain.ndim)))
                flat[kernel] = flat[kernel] * spread
            flat[f"{path}/{norm}/gain"] = jnp.ones_like(gain)
    return flat


def _alone(recipe: Recipe, found: Targets, flat: dict[str, jax.Array]) -> tuple[list[Matrix], dict[str, jax.Array]]:
    """Each matrix by itself."""
    quantizer, matrices, changed = recipe.quantizer(), [], {}
    for path, target in found.matrices.items():
        kernel = flat[path]
        w_NIO = jnp.reshape(kernel, (-1, target.inputs, target.outputs))
        weight_NIO, errors_N, *codes = _stacked(quantizer, target.enters, target.leaves, w_NIO)
        changed[path] = jnp.reshape(weight_NIO, kernel.shape).astype(kernel.dtype)
        bits = quantizer.cost(target.inputs, target.outputs)
        matrices.append(Matrix(target, bits, errors_N, *codes, None))
    return matrices, changed


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _stacked(quantizer: Callable, enters: Rotation | None, leaves: Rotation | None, w_NIO: jax.Array) -> tuple:
    """(weights, errors, codes, scales, zeros) of matrices one after another: a search holds many copies of one."""

    def one(w_IO):
        made = quantizer(into(enters, leaves, w_IO))
        weight_IO = back(enters, leaves, made.weight_IO)
        return weight_IO, relative(w_IO, weight_IO), made.codes_IO, made.scales_GO, made.zeros_GO

    return jax.lax.map(one, w_NIO)


def into(enters: Rotation | None, leaves: Rotation | None, w_IO: jax.Array) -> jax.Array:
    """A^T W B, float32."""
    w_IO = w_IO.astype(jnp.float32)
    w_IO = w_IO if enters is None else enters(w_IO, 0)
    return w_IO if leaves is None else leaves(w_IO, 1)


def back(enters: Rotation | None, leaves: Rotation | None, w_IO: jax.Array) -> jax.Array:
    """A W B^T."""
    w_IO = w_IO if enters is None else enters.inverse(w_IO, 0)
    return w_IO if leaves is None else leaves.inverse(w_IO, 1)


def relative(w_IO: jax.Array, weight_IO: jax.Array) -> jax.Array:
    """|W - Q|^2 / |W|^2."""
    return jnp.sum(jnp.square(w_IO - weight_IO)) / jnp.maximum(jnp.sum(jnp.square(w_IO)), 1e-30)


def _calibrated(
    experiment: Experiment,
    params: dict,
    buffers: dict,
    recipe: Recipe,
    found: Targets,
    calibration: Calibration | None,
    say: Callable[[str], None],
) -> tuple[list[Matrix], dict[str, jax.Array]]:
    """Each matrix with the Hessian of its inputs, in the order in which the network computes with them."""
    quantizer = recipe.quantizer()
    made: dict[str, dict[int | None, tuple]] = {path: {} for path in found.matrices}

    def replace(path: str, index: int | None, w_IO: jax.Array, hessian_II: jax.Array) -> jax.Array:
        target = found.matrices[path]
        if target.enters is not None:
            hessian_II = target.enters(target.enters(hessian_II, 0), 1)
        quantized = quantizer(into(target.enters, target.leaves, w_IO), hessian_II)
        weight_IO = back(target.enters, target.leaves, quantized.weight_IO)
        made[path][index] = (weight_IO, relative(w_IO, weight_IO), quantized)
        return weight_IO

    in_order(experiment, params, buffers, found, calibration, replace, say)
    flat, matrices, changed = checkpoint_tree.flatten(params), [], {}
    for path, layers in made.items():
        parts = [layers[index] for index in sorted(layers)]
        kernel, target = flat[path], found.matrices[path]
        changed[path] = jnp.reshape(jnp.stack([part[0] for part in parts]), kernel.shape).astype(kernel.dtype)
        quantized: list[Quantized] = [part[2] for part in parts]
        fields = ([getattr(one, name) for one in quantized] for name in ("codes_IO", "scales_GO", "zeros_GO"))
        codes = [jnp.stack(field) for field in fields]
        errors_N, damp = jnp.stack([part[1] for part in parts]), max(one.damp for one in quantized)
        if damp > quantizer.damp:
            say(f"{target.layer}: its Hessian needed a damping of {damp:g}, not {quantizer.damp:g}")
        matrices.append(Matrix(target, quantized[0].bits, errors_N, *codes, damp))
    return matrices, changed
