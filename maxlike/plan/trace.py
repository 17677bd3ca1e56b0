"""What a step computes and keeps, read from its traced program: no formula by architecture, so every mixer is known."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from layers import kernels
from layers.active import active_parameters
from layers.language_model import LanguageModel
from layers.parts import parts
from layers.stack import Stack
from maxlike.errors import UserError
from maxlike.experiment import Experiment
from maxlike.objectives.batch import context_of
from maxlike.plan.changes import with_remat


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product of a traced program: `batch` products of [rows, inner] by [inner, columns].

    times: executions, the lengths of all scans around it multiplied. sizes: all dimensions of its three arrays, by
    which those that a mesh cuts are known. bytes: of left, right and result, one execution. dtype: of what is
    multiplied.
    """

    times: int
    batch: int
    rows: int
    inner: int
    columns: int
    sizes: frozenset[int]
    bytes: tuple[int, int, int]
    dtype: str

    @property
    def flops(self) -> float:
        """Of all executions: two a multiply-add."""
        return 2.0 * self.times * self.batch * self.rows * self.inner * self.columns


@dataclasses.dataclass(frozen=True)
class Work:
    """One matrix product of the loss, by rows of the batch.

    flops: of one row, all executions. dims: rows, inner, columns of one product. sizes: all dimensions, by which those
    that a mesh cuts are known. batched: whether it is a stack of products, as in attention. times: executions. a_row,
    fixed: bytes of left, right and result in one execution, for each row and whatever the rows. dtype: of what is
    multiplied: "float8" and "int8" have peaks of their own.
    """

    flops: float
    dims: tuple[int, int, int]
    sizes: frozenset[int]
    batched: bool
    times: int
    a_row: tuple[float, float, float]
    fixed: tuple[float, float, float]
    dtype: str

    @classmethod
    def between(cls, one: Product, two: Product) -> "Work":
        """Of the same product in a program of one row and of two."""
        a_row = tuple(two.times * b / one.times - a for a, b in zip(one.bytes, two.bytes))
        return cls(
            flops=two.flops - one.flops,
            dims=(one.rows, one.inner, one.columns),
            sizes=one.sizes,
            batched=one.batch > 1,
            times=one.times,
            a_row=a_row,
            fixed=tuple(a - more for a, more in zip(one.bytes, a_row)),
            dtype=one.dtype,
        )


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that the forward pass keeps for the backward pass.

    sizes: its dimensions, by which those that a mesh cuts are known. a_row: bytes of one row of the batch. stacked:
    how many layers it holds, 1 where it is of none.
    """

    sizes: frozenset[int]
    a_row: float
    stacked: int


def products(jaxpr: Any, times: int = 1) -> Iterator[Product]:
    """All matrix products of a jaxpr. Of the branches of a conditional the one with the most FLOPs counts; the body of
    a `while` whose trip count is not in its program counts once."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            yield _product(equation, times)
        elif name == "ragged_dot_general":
            yield _ragged(equation, times)
        elif name == "conv_general_dilated":
            yield _convolution(equation, times)
        elif name == "cond":
            branches = [list(products(b.jaxpr, times)) for b in equation.params["branches"]]
            yield from max(branches, key=lambda found: sum(p.flops for p in found))
        else:
            inner = times * (equation.params["length"] if name == "scan" else 1)
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    part = part.jaxpr if isinstance(part, jax.extend.core.ClosedJaxpr) else part
                    if isinstance(part, jax.extend.core.Jaxpr):
                        yield from products(part, inner)


def _sizes(equation: Any) -> tuple[frozenset[int], tuple[int, int, int], str]:
    arrays = [v.aval for v in (*equation.invars[:2], equation.outvars[0])]
    return (
        frozenset(d for a in arrays for d in a.shape),
        tuple(a.size * a.dtype.itemsize for a in arrays),
        _dtype(arrays),
    )


def _dtype(arrays: list[Any]) -> str:
    """Of a product: the wider side's, and whatever the layout of the 8 bits of a float."""
    name = max(arrays[:2], key=lambda a: a.dtype.itemsize).dtype.name
    return "float8" if name.startswith("float8") else name


def _product(equation: Any, times: int) -> Product:
    (left_in, right_in), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left, right = (v.aval.shape for v in equation.invars)
    rows = math.prod(d for i, d in enumerate(left) if i not in (*left_in, *left_batch))
    columns = math.prod(d for i, d in enumerate(right) if i not in (*right_in, *right_batch))
    inner, batch = (math.prod(left[i] for i in dims) for dims in (left_in, left_batch))
    return Product(times, batch, rows, inner, columns, *_sizes(equation))


def _ragged(equation: Any, times: int) -> Product:
    """Rows sorted by group, each multiplied by its group's matrix."""
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if len(out) == 3:  # the gradient of the matrices: [rows, inner]^T [rows, columns] by groups
        return Product(times, 1, out[1], left[0], out[2], *_sizes(equation))
    return Product(times, 1, left[0], left[1], out[-1], *_sizes(equation))


def _convolution(equation: Any, times: int) -> Product:
    """As the product of patches by the kernel."""
    numbers = equation.params["dimension_numbers"]
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval
    channels = kernel[numbers.rhs_spec[0]]
    inner = math.prod(kernel) // channels
    return Product(times, 1, out.size // channels, inner, channels, *_sizes(equation))


@dataclasses.dataclass(frozen=True)
class Trace:
    """Rows of `sequence_length` tokens through a network, forward and backward, and one update.

    row: the matrix products of a row. again: those of one more forward pass of the repeated layers. kept: what the
    forward pass keeps for the backward pass. block: what a forward pass that recomputes nothing keeps, of which the
    backward pass of a block has its share alive. update: products of the optimizer. dim, vocab (padded), blocks (of one
    period of the stack), depth (all blocks): of the network. flops_per_token: by the convention of `maxlike.mfu`.
    active: parameters that a token uses. remat: `Stack.remat`.
    """

    row: tuple[Work, ...]
    again: tuple[Work, ...]
    kept: tuple[Kept, ...]
    block: tuple[Kept, ...]
    update: tuple[Product, ...]
    dim: int
    vocab: int
    blocks: int
    depth: int
    flops_per_token: float
    active: float
    remat: str


def abstract_batch(experiment: Experiment, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of text, without opening any data."""
    shape = (rows, experiment.sequence_length)
    fields = ("inputs", "targets", "segment_ids", "positions", "loss_weights", "target_bytes")
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "loss_weights" else jnp.int32) for name in fields}


def trace(experiment: Experiment, platform: str) -> Trace:
    """Traces the experiment's objective for `platform`, as one device without a mesh would run it, its layers scanned.
    Nothing is computed. Raises UserError for a network that is no LanguageModel."""
    network = experiment.bare()
    if not isinstance(network, LanguageModel):
        raise UserError(
            f"plan knows batches of text alone, and this network is {type(network).__name__}: take an experiment with "
            "LanguageModel"
        )
    stack = network.stack
    with kernels.compile_for(platform), kernels.choose("layers", "scan"):
        row, kept = _works(experiment), _kept(experiment)
        block = kept
        if any(stack.remat != "none" for stack in parts(experiment.bare(), Stack)):
            block = _kept(with_remat(experiment, "none"))
        return Trace(
            row=row,
            again=_again(experiment),
            kept=kept,
            block=block,
            update=_update(experiment),
            dim=network.dim,
            vocab=network.padded_vocab,
            blocks=len(stack.periods),
            depth=len(stack.prefix) + stack.repeats * len(stack.periods) + len(stack.suffix),
            flops_per_token=network.flops_per_token(experiment.sequence_length),
            active=active_parameters(network),
            remat=network.stack.remat,
        )


def _works(experiment: Experiment) -> tuple[Work, ...]:
    model = experiment.abstract_model()
    differentiate = jax.value_and_grad(functools.partial(_loss, experiment), argnums=(0, 1))
    return _of_a_row(lambda rows: (differentiate, (model.params, model.buffers, abstract_batch(experiment, rows))))


def _again(experiment: Experiment) -> tuple[Work, ...]:
    """Of a forward pass of the repeated layers alone: what a pipeline computes once more."""
    model, dtype = experiment.abstract_model(), jnp.dtype(experiment.step.compute_dtype)

    def forward(params: dict, buffers: dict, batch: dict, x_BTD: jax.Array) -> jax.Array:
        network = model.merge(model.cast(params, dtype), buffers)
        ctx = network.context(batch["inputs"], context_of(batch, jax.random.key(0)))
        return network.stack.run_periods(network.stack.periods, x_BTD, ctx, 0)[0]

    def of_rows(rows: int) -> tuple[Callable, tuple]:
        x = jax.ShapeDtypeStruct((rows, experiment.sequence_length, experiment.bare().dim), dtype)
        return forward, (model.params, model.buffers, abstract_batch(experiment, rows), x)

    return _of_a_row(of_rows)


def _of_a_row(of_rows: Callable[[int], tuple[Callable, tuple]]) -> tuple[Work, ...]:
    """The products of a function. of_rows: number of rows -> the function, its abstract arguments."""
    one, two = (
        products(jax.make_jaxpr(function)(*arguments).jaxpr) for function, arguments in (of_rows(1), of_rows(2))
    )
    return tuple(itertools.starmap(Work.between, zip(one, two, strict=True)))


def _loss(experiment: Experiment, params: dict, buffers: dict, batch: dict) -> jax.Array:
    model, objective = experiment.abstract_model(), experiment.objective
    return experiment.step.loss(params, buffers, batch, jax.random.key(0), model, objective)[0].total


def _kept(experiment: Experiment) -> tuple[Kept, ...]:
    """Residuals of the loss whose size depends on the number of rows: neither parameters nor their copies."""
    model = experiment.abstract_model()

    def residuals(params, buffers, batch):
        return jax.vjp(lambda p, b: _loss(experiment, p, b, batch), params, buffers)[1]

    one, two = (
        jax.tree.leaves(jax.eval_shape(residuals, model.params, model.buffers, abstract_batch(experiment, rows)))
        for rows in (1, 2)
    )
    repeats = {stack.repeats for stack in parts(experiment.bare(), Stack)}
    return tuple(
        Kept(frozenset(a.shape), _bytes(b) - _bytes(a), a.shape[0] if len(a.shape) > 1 and a.shape[0] in repeats else 1)
        for a, b in zip(one, two, strict=True)
        if a.shape != b.shape
    )


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _update(experiment: Experiment) -> tuple[Product, ...]:
    """Matrix products of the optimizer (Muon has them)."""
    params = experiment.abstract_model().params
    optimizer = experiment.optimizer(experiment.abstract_model().axes, experiment.clock)
    state = jax.eval_shape(optimizer.init, params)
    return tuple(products(jax.make_jaxpr(optimizer.update)(params, state, params).jaxpr))
