"""Stack: a pattern of blocks repeated in depth, its parameters stacked, scanned or unrolled."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from layers import axes, kernels, taps
from layers.block import Aux
from layers.context import Context, CountsLayers, ReadsSource
from layers.parts import map_parts, parts
from layers.pooled_balance import pool
from layers.remat import POLICIES, policy


class Stack(nnx.Module):
    """prefix blocks, then `pattern` repeated depth / len(pattern) times, then suffix blocks.

    x and y: [B, T, D]. aux: for each name, the values of the layers that report it, in order of depth on a leading
    axis. Parameters of the repeated part carry a leading "layers" axis of depth / len(pattern).

    Knobs:
        pattern, prefix, suffix: tuples of block factories. depth: number of blocks of the repeated part.
        remat: what a block keeps for its backward pass: "none" keeps all, "full" only its input, "branches" also the
        outputs of mixer and feed-forward, "matmul_half" attention's output and the feed-forward's first products,
        "dots" every matrix product, "dots_no_batch" those with a weight; "offload" keeps the large ones (remat.LARGE)
        in the host's memory. Routers' choices are always kept.
        scan: True compiles one period and loops over it (compile time and memory do not grow with depth); False
        unrolls; None takes the faster as measured: unrolled on CPU (1.80 s against 2.26 s a step of a 6-layer model),
        else scanned.
        pipeline: factory such as pipeline.Circular of how the repeated part runs where the mesh spreads "layers" over
        stages; None for a mesh without.
    Refuses an empty pattern, and a depth that is no positive multiple of its length; mixers made for fewer layers than
    there are; a mesh with stages without a pipeline; a cache for blocks one of which has none (causal=False) or has it
    from an encoder's source alone (CrossAttention). Decoding runs stage after stage.
    """

    def __init__(
        self,
        dim: int,
        *,
        pattern: tuple[Callable, ...],
        depth: int,
        prefix: tuple[Callable, ...] = (),
        suffix: tuple[Callable, ...] = (),
        remat: Literal["none", "full", "branches", "matmul_half", "dots", "dots_no_batch", "offload"] = "none",
        scan: bool | None = None,
        pipeline: Callable | None = None,
        rngs: nnx.Rngs,
    ):
        if not pattern:
            raise ValueError("Stack.pattern is empty: give at least one block factory")
        if depth < 1 or depth % len(pattern):
            raise ValueError(f"Stack.depth={depth} must be a positive multiple of the pattern's length {len(pattern)}")
        if remat != "none" and remat not in POLICIES:
            raise ValueError(f"Stack.remat={remat!r} must be 'none' or one of {', '.join(POLICIES)}")
        self.remat, self.scan = remat, scan
        self.pipeline = None if pipeline is None else pipeline()
        self.repeats = depth // len(pattern)

        def period(key):
            keys = jax.random.split(key, len(pattern))
            return nnx.List([block(dim, rngs=axes.Keys(k)) for block, k in zip(pattern, keys)])

        self.prefix = nnx.List([block(dim, rngs=rngs) for block in prefix])
        self.periods = _name_layers(jax.vmap(period)(jax.random.split(rngs.params(), self.repeats)))
        self.suffix = nnx.List([block(dim, rngs=rngs) for block in suffix])
        for mixer in parts((self.prefix, self.periods, self.suffix), CountsLayers):
            mixer.check_layers(self._last + len(suffix))

    def _scanned(self) -> bool:
        on_cpu = kernels.platform() == "cpu"
        faster, reason = (
            ("unrolled", "faster measured on CPU") if on_cpu else ("scan", f"compiles once on {kernels.platform()}")
        )
        if self.scan is not None:
            faster, reason = ("scan" if self.scan else "unrolled"), "Stack.scan"
        return kernels.take("layers", faster, reason) == "scan"

    def _block(self, block, x_BTD, ctx: Context, layer) -> tuple[jax.Array, Aux]:
        ctx = ctx.replace(layer=layer, key=None if ctx.key is None else jax.random.fold_in(ctx.key, layer))
        if self.remat == "none":
            return block(x_BTD, ctx)
        run = jax.checkpoint(lambda block, x_BTD, ctx: block(x_BTD, ctx), policy=policy(self.remat))
        return run(block, x_BTD, ctx)

    def _run(self, x_BTD, blocks, caches, ctx: Context, first):
        """Blocks in a row, from layer `first`; returns their aux, or while decoding their caches."""
        out = []
        for i, block in enumerate(blocks):
            layer = jnp.asarray(first + i, jnp.int32)
            if caches is None:
                x_BTD, value = self._block(block, x_BTD, ctx, layer)
            else:
                x_BTD, value = block.extend(x_BTD, caches[i], ctx.replace(layer=layer))
            x_BTD = taps.tap("residual", x_BTD, block)
            out.append(value)
        return x_BTD, tuple(out)

    def run_periods(self, periods, x_BTD: jax.Array, ctx: Context, start, caches=None) -> tuple[jax.Array, Any]:
        """Consecutive periods of the repeated part, all of them or a stage's, of which the first is number `start`;
        results of each position of the pattern stacked over the periods."""
        first, size = len(self.prefix), len(periods)
        count = jax.tree.leaves(periods)[0].shape[0]
        if self._scanned():

            def body(x_BTD, xs):
                index, blocks, caches = xs
                return self._run(x_BTD, blocks, caches, ctx, first + index * size)

            return jax.lax.scan(body, x_BTD, (start + jnp.arange(count), periods, caches))
        out = []
        for index, (blocks, cache) in enumerate(zip(unstack(periods, count), unstack(caches, count))):
            x_BTD, values = self._run(x_BTD, blocks, cache, ctx, first + (start + index) * size)
            out.append(values)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *out)

    def _repeat(self, x_BTD, ctx: Context):
        """The repeated part, in a pipeline where there are stages."""
        if not self.repeats:
            return x_BTD, ()
        if not axes.mesh_axes("layers"):
            return self.run_periods(self.periods, x_BTD, ctx, 0)
        if self.pipeline is None:
            raise ValueError(
                f"Stack.pipeline=None on a mesh whose axes {axes.mesh_axes('layers')} are stages of layers: bind "
                "pipeline.Circular to it, as the overlay mesh/pipeline does, or leave the axis out of Mesh.shape"
            )
        return self.pipeline(self.run_periods, self.periods, x_BTD, ctx)

    def enter(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, tuple[Aux, ...]]:
        """The blocks before the repeated part, and what each reports."""
        return self._run(x_BTD, self.prefix, None, ctx, 0)

    def leave(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, tuple[Aux, ...]]:
        """The blocks behind the repeated part, and what each reports."""
        return self._run(x_BTD, self.suffix, None, ctx, self._last)

    @property
    def _last(self) -> int:
        """Index of the first layer behind the repeated part."""
        return len(self.prefix) + self.repeats * len(self.periods)

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Aux]:
        x_BTD, before = self.enter(x_BTD, ctx)
        x_BTD, middle = self._repeat(x_BTD, ctx)
        x_BTD, after = self.leave(x_BTD, ctx)
        return x_BTD, pool(by_depth(before, middle, after))

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype, *, source: bool = False) -> dict[str, Any]:
        """Empty caches of all blocks for rows of at most `length` tokens. source: whether an encoder's output will fill
        those of cross-attentions (EncoderDecoder)."""

        def cache(block, layer: int):
            try:
                if not source and parts(block, ReadsSource):
                    raise ValueError("cross-attention decodes in EncoderDecoder.decoder alone, which has a source")
                return block.init_cache(batch, length, dtype)
            except ValueError as refusal:
                raise ValueError(
                    f"Stack.pattern has no cache: its layer {layer}, a {type(block).__name__}, cannot decode beside "
                    f"the others ({refusal})"
                ) from refusal

        def caches(blocks, first: int):
            return tuple(cache(block, first + i) for i, block in enumerate(blocks))

        before, after = caches(self.prefix, 0), caches(self.suffix, self._last)
        middle = caches(self.periods, len(self.prefix))
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * self.repeats), middle)
        return {"prefix": before, "periods": stacked, "suffix": after}

    def extend(self, x_BTD: jax.Array, cache: dict[str, Any], ctx: Context) -> tuple[jax.Array, dict[str, Any]]:
        x_BTD, before = self._run(x_BTD, self.prefix, cache["prefix"], ctx, 0)
        middle = cache["periods"]
        if self.repeats:
            x_BTD, middle = self.run_periods(self.periods, x_BTD, ctx, 0, middle)
        x_BTD, after = self._run(x_BTD, self.suffix, cache["suffix"], ctx, self._last)
        return x_BTD, {"prefix": before, "periods": middle, "suffix": after}

    def unrolled(self) -> "Stack":
        """The same blocks, each with arrays of its own, none repeated; itself where the repeats are scanned.

        For a loop of decoding steps: slicing the stacked parameters and restacking the caches would copy all of them in
        every step (on CPU 3 times the cost of reading the weights).
        """
        return self if self._scanned() else self._flat()

    def bare(self) -> "Stack":
        """The same blocks in a row, whatever would scan them, rematerialise them or spread them over stages: what taps
        see in them can be returned from the function that runs them."""
        flat = self._flat()
        flat.remat, flat.pipeline = "none", None
        return flat

    def _flat(self) -> "Stack":
        flat = copy.copy(self)
        blocks = [block for period in unstack(self.periods, self.repeats) for block in period]
        flat.prefix = nnx.List([*self.prefix, *blocks])
        flat.periods, flat.repeats = nnx.List([]), 0
        return flat

    def flops_per_token(self, length: int) -> float:
        outside = sum(block.flops_per_token(length) for block in (*self.prefix, *self.suffix))
        return outside + self.repeats * sum(block.flops_per_token(length) for block in self.periods)


def unroll(network: Any) -> Any:
    """A network with every Stack in it `unrolled`."""
    return map_parts(Stack.unrolled, network, Stack)


def lay_bare(network: Any) -> Any:
    """A network with every Stack in it `bare`: for `layers.taps`."""
    return map_parts(Stack.bare, network, Stack)


def _name_layers(stacked):
    """Adds the leading "layers" axis to the metadata of every stacked variable."""
    for variable in jax.tree.leaves(stacked, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return stacked


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[i] for i in range(x.shape[0]))


# The transpose of n slices would add n zero-padded arrays of the full size; one stack does.
_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, gradients: (jnp.stack(gradients),))


def unstack(tree: Any, length: int) -> list[Any]:
    """The `length` slices along the leading axis of every leaf; the backward pass is one stack a leaf."""
    leaves, structure = jax.tree.flatten(tree)
    slices = [_unstack(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else list(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [leaf[i] for leaf in slices]) for i in range(length)]


def by_depth(before: tuple[Aux, ...], middle: tuple[Aux, ...], after: tuple[Aux, ...]) -> Aux:
    """For each name the values of all layers that report it, shallow first, on a leading axis: of the blocks before the
    repeated part, of each position of its pattern stacked over the repeats, and of the blocks behind it."""
    out = {}
    for name in dict.fromkeys(name for aux in (*before, *middle, *after) for name in aux):
        repeated = [aux[name] for aux in middle if name in aux]
        parts = [aux[name][None] for aux in before if name in aux]
        if repeated:
            x = jnp.stack(repeated, 1)  # [repeats, positions of the pattern, ...]
            parts.append(jnp.reshape(x, (-1, *x.shape[2:])))
        parts += [aux[name][None] for aux in after if name in aux]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = sorted({part.shape[1:] for part in parts})
            raise ValueError(
                f"layers report {name!r} in different shapes {shapes}: give the metric one shape or two names"
            )
        out[name] = jnp.concatenate(parts)
    return out
