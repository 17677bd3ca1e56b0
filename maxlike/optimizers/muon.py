"""Muon: momentum, orthogonalised."""

from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from layers.axes import constrain
from maxlike.errors import UserError
from maxlike.optimizers import groups
from maxlike.schedules import Clock

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon:
    """Orthogonalised momentum for matrices, another optimizer for everything else.

    For a matrix W [rows (inputs), columns (outputs)] with gradient G, from B = 0 and without bias correction:
        B <- momentum B + G;  U = G + momentum B if nesterov else B;  X = newton_schulz(U)
        W <- W - lr (scale X + weight_decay W)
    Source: Keller Jordan's Muon in the form of Outlier-Safe Pre-Training, arXiv 2506.19697.

    What a matrix is, the logical axes say: a kernel with two sides, heads and head_dim counting as one, so the query
    kernel (embed, heads, head_dim) is embed x heads*head_dim. Stacked layers and experts are matrices of their own.
    Token embeddings, the output head, gains and biases go to `others`, an optimizer with a schedule of its own.

    schedule: learning rate. momentum: in [0, 1). ns_steps: Newton-Schulz iterations, >= 1. weight_decay: >= 0.
    ns_dtype: of the iterations; bfloat16 on accelerators, float32 where bfloat16 is emulated (CPU).
    scale: "rms0.2" = 0.2 sqrt(max(rows, columns)), updates of the size of Adam's; "spectral" =
        sqrt(max(1, columns / rows)), updates of spectral norm one between RMS-normed activations; "none" = 1.
    stack_shards: matrices of one shape are orthogonalised as one stack. With more than 1, stacks are padded to a
        multiple of it and laid out along the logical axis "matrices", so that each device orthogonalises whole
        matrices without communication; 1 leaves the layout to the compiler.
    Raises UserError outside these ranges.
    """

    takes: ClassVar[tuple[groups.Kind, ...]] = ("matrix",)

    def __init__(
        self,
        *,
        schedule: Callable,
        others: Callable,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        scale: Literal["rms0.2", "spectral", "none"] = "rms0.2",
        weight_decay: float = 0.01,
        stack_shards: int = 1,
    ):
        if ns_steps < 1:
            raise UserError(f"Muon.ns_steps={ns_steps} must be at least 1.")
        if ns_dtype not in ("bfloat16", "float32"):
            raise UserError(f'Muon.ns_dtype={ns_dtype!r} is unknown: use "bfloat16" or "float32".')
        if scale not in ("rms0.2", "spectral", "none"):
            raise UserError(f'Muon.scale={scale!r} is unknown: use "rms0.2", "spectral" or "none".')
        if stack_shards < 1:
            raise UserError(f"Muon.stack_shards={stack_shards} must be at least 1.")
        self.schedule, self.others = schedule, others
        self.momentum, self.nesterov = groups.fraction("Muon.momentum", momentum), nesterov
        self.ns_steps, self.ns_dtype, self.scale, self.stack_shards = ns_steps, ns_dtype, scale, stack_shards
        self.rules = dict.fromkeys(self.takes, groups.Rule(groups.nonnegative("Muon.weight_decay", weight_decay)))

    def __call__(self, axes: dict, clock: Clock) -> optax.GradientTransformation:
        labels, parts = self._split(axes)
        matrices = optax.chain(
            self._direction(parts["matrices"]), groups.descend(parts["matrices"], self.rules, self.schedule(clock))
        )
        return groups.partition({"matrices": matrices, "others": self.others(parts["others"], clock)}, labels)

    def describe(self, axes: dict) -> dict[str, str]:
        """path -> what happens to the parameter."""
        _, parts = self._split(axes)
        return groups.describe(parts["matrices"], "muon", self.rules) | self.others.describe(parts["others"])

    def _split(self, axes: dict) -> tuple[dict, dict[str, dict]]:
        labels = jax.tree.map(lambda kind: "matrices" if kind in self.takes else "others", groups.kinds(axes))
        return labels, {label: groups.select(axes, labels, label) for label in ("matrices", "others")}

    def _direction(self, axes: dict) -> optax.GradientTransformation:
        views = jax.tree.leaves(jax.tree.map(groups.view, axes, is_leaf=lambda leaf: isinstance(leaf, tuple)))

        def init(params):
            return {"momentum": jax.tree.map(jnp.zeros_like, params)}

        def update(gradients, state, params):
            momentum = jax.tree.map(lambda b, g: self.momentum * b + g, state["momentum"], gradients)
            mixed = momentum
            if self.nesterov:
                mixed = jax.tree.map(lambda g, b: g + self.momentum * b, gradients, momentum)
            leaves, tree = jax.tree.flatten(mixed)
            matrices = [view.of(leaf) for view, leaf in zip(views, leaves, strict=True)]
            dtype = jnp.dtype(self.ns_dtype)
            orthogonal = orthogonalize(matrices, steps=self.ns_steps, dtype=dtype, shards=self.stack_shards)
            scaled = [self._scale(*x.shape[-2:]) * x for x in orthogonal]
            return tree.unflatten([x.reshape(leaf.shape) for x, leaf in zip(scaled, leaves)]), {"momentum": momentum}

        return optax.GradientTransformation(init, update)

    def _scale(self, rows: int, columns: int) -> float:
        if self.scale == "rms0.2":
            return 0.2 * max(rows, columns) ** 0.5
        return max(1.0, columns / rows) ** 0.5 if self.scale == "spectral" else 1.0


def newton_schulz(x: jax.Array, steps: int) -> jax.Array:
    """`steps` times s -> a s + b s^3 + c s^5 on the singular values of each matrix of x [..., short, long].

    Singular values must start within [0, 1]; after five steps those above 0.01 lie in [0.68, 1.14], not at 1. Computed
    in the dtype of x; float32 means float32 also where the hardware would rather multiply in less.
    """
    a, b, c = COEFFICIENTS
    precision = "highest" if x.dtype == jnp.float32 else "default"
    for _ in range(steps):
        gram = jnp.matmul(x, x.mT, precision=precision)
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        x = a * x + jnp.matmul(polynomial, x, precision=precision)
    return x


def orthogonalize(matrices: list[jax.Array], *, steps: int, dtype: jnp.dtype, shards: int = 1) -> list[jax.Array]:
    """Newton-Schulz on each matrix of each [..., rows, columns] array; zero stays zero. Returns float32 arrays.

    Matrices of one shape, up to transposition, are iterated as one stack: few large batched products.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, x in enumerate(matrices):
        by_shape.setdefault((min(x.shape[-2:]), max(x.shape[-2:])), []).append(i)
    results: list[jax.Array | None] = [None] * len(matrices)
    for (short, long), members in by_shape.items():
        stack = jnp.concatenate([_normed(matrices[i], dtype).reshape(-1, short, long) for i in members])
        number = len(stack)
        if shards > 1:
            stack = jnp.pad(stack, ((0, -number % shards), (0, 0), (0, 0)))
            stack = constrain(stack, "matrices", None, None)
        stack = newton_schulz(stack, steps)
        if shards > 1:
            stack = constrain(stack, "matrices", None, None)[:number]
        start = 0
        for i in members:
            x = matrices[i]
            count = x.size // (short * long)
            part = stack[start : start + count].astype(jnp.float32)
            start += count
            results[i] = _transposed(part, x.shape).reshape(x.shape)
    return results


def _normed(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x by its Frobenius norm, short side first."""
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    return _transposed((x / (norm + 1e-8)).astype(dtype), x.shape)


def _transposed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return x.mT if shape[-2] > shape[-1] else x
