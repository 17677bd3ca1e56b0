"""Calibration: the inputs that each matrix meets in a network whose earlier matrices are already quantized."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import taps
from layers.axes import Buffer
from layers.context import Context
from layers.language_model import LanguageModel
from layers.linear import Linear
from layers.parts import named_parts
from layers.stack import Stack
from maxlike import checkpoint_tree
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.objectives.batch import context_of
from maxlike.quantize.targets import Targets

Replace = Callable[[str, int | None, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Batches [B, T] of the training split."""

    batches: tuple[dict[str, np.ndarray], ...]

    @classmethod
    def of(cls, experiment: Experiment, rows: int) -> "Calibration":
        """The first batches of the training data that hold at least `rows` rows. Raises UserError for no rows."""
        if rows < 1:
            raise UserError(f"a calibration of {rows} rows is empty: GPTQ needs inputs to work on, such as --rows 128")
        size = experiment.batch_size // experiment.step.micro_batches
        data = experiment.data.train(
            sequence_length=experiment.sequence_length, batch_size=size, seed=experiment.seed, steps=experiment.steps
        )
        return cls(tuple(data.batch(step) for step in range(-(-rows // size))))


@dataclasses.dataclass(frozen=True)
class Place:
    """A block of a stack: `path` of its parameters, and which of the repeats that are stacked there, None for none."""

    path: str
    index: int | None


def in_order(
    experiment: Experiment,
    params: dict,
    buffers: dict,
    found: Targets,
    calibration: Calibration | None,
    replace: Replace,
    say: Callable[[str], None],
) -> None:
    """Calls `replace(path, repeat, w_IO, hessian_II) -> w_IO` for every matrix in the order of the computation.

    hessian_II = 2/n sum x x^T, float32, over the n calibration tokens. Matrices that read one input are replaced
    together (queries, keys and values; gate and up); inputs are collected anew after each such set ("true sequential",
    arXiv 2210.17323), in the experiment's compute dtype, activations not quantized.
    Raises UserError for a network that is no plain stack of blocks, and a layer that the calibration does not reach.
    """
    network, model = experiment.bare(), experiment.abstract_model()
    if not isinstance(network, LanguageModel) or type(network.stack) is not Stack:
        raise UserError(
            f"GPTQ walks through the blocks of a LanguageModel, and this is a {type(network).__name__}: use rtn or nf4"
        )
    if calibration is None or not calibration.batches:
        raise UserError("GPTQ without calibration: its Hessians need rows of the training split")
    cast = model.cast(params, jnp.dtype(experiment.step.compute_dtype))
    begin = jax.jit(functools.partial(_begin, model))
    streams = [_Stream(*begin(cast, buffers, batch)) for batch in calibration.batches]
    tokens = sum(int(jnp.sum(stream.real_BT)) for stream in streams)
    widest = max((target.inputs for target in found.matrices.values()), default=0)
    if tokens < widest:
        say(
            f"calibration has {tokens} tokens and a matrix {widest} inputs: its Hessian is singular, damping carries it"
        )
    walks: dict[str, _Walk] = {}
    for layer, place in enumerate(_places(network.stack)):
        if place.path not in walks:
            walks[place.path] = _Walk(_at(network, place.path))
        for stream in streams:
            stream.ctx = stream.ctx.replace(layer=jnp.asarray(layer, jnp.int32))
        exact, mutable, state = (_at(tree, place.path, place.index) for tree in (params, cast, buffers))
        walks[place.path].replace_in(place, exact, mutable, state, streams, tokens, found, replace)


@dataclasses.dataclass
class _Stream:
    """What flows between two blocks for one batch."""

    x_BTD: jax.Array
    ctx: Context
    real_BT: jax.Array


def _begin(model: Any, params: dict, buffers: dict, batch: dict) -> tuple[jax.Array, Context, jax.Array]:
    network = model.merge(params, buffers)
    ctx = network.context(batch["inputs"], context_of(batch, None))
    return network.enter(batch["inputs"], ctx), ctx, batch["segment_ids"] != 0


def _places(stack: Stack) -> Iterator[Place]:
    """The blocks of a network's stack, shallow first."""
    yield from (Place(f"stack/prefix/{i}", None) for i in range(len(stack.prefix)))
    for repeat in range(stack.repeats):
        yield from (Place(f"stack/periods/{i}", repeat) for i in range(len(stack.periods)))
    yield from (Place(f"stack/suffix/{i}", None) for i in range(len(stack.suffix)))


def _at(tree: Any, path: str, index: int | None = None) -> Any:
    """The part of a tree of modules or of nested dicts at a path, one of its stacked repeats; {} where it has none."""
    for name in path.split("/"):
        key: str | int = int(name) if name.isdigit() else name
        if isinstance(tree, dict):
            tree = tree.get(key, {})
        else:
            tree = tree[key] if isinstance(key, int) else vars(tree)[key]
    return tree if index is None else jax.tree.map(lambda leaf: leaf[index], tree)


class _Walk:
    """The blocks at one place of the pattern: compiled once for all its repeats."""

    def __init__(self, block: nnx.Module):
        self._graph = nnx.split(block, nnx.Param, Buffer)[0]
        self._observe = jax.jit(self._run)
        self._sets: list[list[str]] | None = None

    def replace_in(
        self,
        place: Place,
        exact: dict,
        params: dict,
        buffers: dict,
        streams: list[_Stream],
        tokens: int,
        found: Targets,
        replace: Replace,
    ) -> None:
        """One block: its matrices replaced set by set, and the streams taken through what has become of it."""
        if self._sets is None:
            calls: list[tuple[Any, str]] = []
            first = streams[0]
            jax.eval_shape(
                functools.partial(self._run, calls=calls), params, buffers, first.x_BTD, first.ctx, first.real_BT
            )
            self._sets = _sets(calls)
        structure, flat, original = jax.tree.structure(params), *map(checkpoint_tree.flatten, (params, exact))
        wanted = {path.removeprefix(f"{place.path}/") for path in found.matrices if path.startswith(f"{place.path}/")}
        missed = sorted(wanted - {name for names in self._sets for name in names})
        if missed:
            raise UserError(f"{place.path}/{missed[0]}: no input of it was seen in calibration: use rtn or nf4")
        for names in self._sets:
            chosen = [name for name in names if name in wanted]
            if not chosen:
                continue
            tree = jax.tree.unflatten(structure, list(flat.values()))
            sums: dict[str, jax.Array] | None = None
            for stream in streams:
                moments = self._observe(tree, buffers, stream.x_BTD, stream.ctx, stream.real_BT)[1]
                moments = {name: moments[name] for name in chosen}
                sums = moments if sums is None else {name: sums[name] + moments[name] for name in chosen}
            for name in chosen:
                hessian_II, kernel = sums[name] * (2.0 / tokens), original[name]
                w_IO = jnp.reshape(kernel, (len(hessian_II), -1))
                new_IO = replace(f"{place.path}/{name}", place.index, w_IO, hessian_II)
                flat[name] = jnp.reshape(new_IO, kernel.shape).astype(flat[name].dtype)
        tree = jax.tree.unflatten(structure, list(flat.values()))
        for stream in streams:
            stream.x_BTD = self._observe(tree, buffers, stream.x_BTD, stream.ctx, stream.real_BT)[0]

    def _run(
        self,
        params: dict,
        buffers: dict,
        x_BTD: jax.Array,
        ctx: Context,
        real_BT: jax.Array,
        calls: list[tuple[Any, str]] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The block's output, and for the kernel of each of its Linear layers the sum of x x^T."""
        block = nnx.merge(self._graph, params, buffers)
        owners = {id(linear): f"{path}/kernel" for path, linear in named_parts(block, Linear).items()}
        sums: dict[str, jax.Array] = {}

        def see(x: jax.Array, owner: Any) -> jax.Array:
            name = owners.get(id(owner))
            if name is not None:
                moment = _moment(x, owner, real_BT)
                sums[name] = sums[name] + moment if name in sums else moment
                if calls is not None:
                    calls.append((x, name))
            return x

        with taps.opened({"linear_input": see}):
            y_BTD, _ = block(x_BTD, ctx)
        return y_BTD, sums


def _moment(x: jax.Array, linear: Linear, real_BT: jax.Array) -> jax.Array:
    """Sum of x x^T over the tokens, [inputs, inputs]; without padding where the rows are whole."""
    x = jnp.reshape(x.astype(jnp.float32), (*x.shape[: x.ndim - linear.input_dims], linear.inputs))
    if x.shape[:2] == real_BT.shape and x.ndim == 3:
        x = jnp.where(real_BT[..., None], x, 0.0)
    x_NI = jnp.reshape(x, (-1, linear.inputs))
    return jnp.matmul(x_NI.T, x_NI, precision=jax.lax.Precision.HIGHEST)


def _sets(calls: list[tuple[Any, str]]) -> list[list[str]]:
    """Kernels in the order of the computation; those that read the same array one after another are one set."""
    sets: list[list[str]] = []
    before = None
    for x, name in calls:
        if x is before:
            sets[-1].append(name)
        else:
            sets.append([name])
        before = x
    return sets
