"""The implementations of every operation that chooses one, against each other: forward and backward, by length."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import kernels
from layers.context import Context
from layers.dual_chunk import DualChunk
from layers.grouped_matmul import grouped_matmul
from layers.recurrence import recurrence
from layers.rope import RoPE
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word
from maxlike.experiment import Experiment
from maxlike.objectives.cross_entropy import chunk_length, cross_entropy

NEAR = "<= 1.05"  # of the fastest, for the implementation that is taken


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: of a call, in rows of each of the lengths. whole: the longest row whose scores are ever held at once.
    width: of an expert."""

    heads: int
    head_dim: int
    tokens: int
    dtype: str
    lengths: tuple[int, ...]
    whole: int
    experts: int
    width: int
    vocab: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


CPU = Sizes(
    heads=4, head_dim=64, tokens=4096, dtype="float32", lengths=(256, 1024, 4096), whole=4096, experts=8, width=512,
    vocab=4096,
)  # fmt: skip
ACCELERATOR = Sizes(
    heads=16, head_dim=128, tokens=16384, dtype="bfloat16", lengths=(1024, 4096, 8192), whole=4096, experts=8,
    width=2048, vocab=32768,
)  # fmt: skip
FLASH = {"cpu": (), "gpu": ("cudnn",), "tpu": ("splash",)}  # what only this platform has


@dataclasses.dataclass(frozen=True)
class Case:
    """loss(*arrays) with each of the implementations; `taken` is the one that is picked by itself."""

    name: str
    arrays: tuple
    losses: dict[str, Callable]
    taken: str


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` rounds of every case; in each, all of its implementations run once, so that what else the machine does
    falls on all alike. What each needs in temporary memory is kept beside, for a choice may be made by that. The
    experiment that the job was given, and its steps, do not matter here."""
    sizes = CPU if kernels.platform() == "cpu" else ACCELERATOR
    quantities, milliseconds, temporary = [], {}, {}
    for case in cases(sizes):
        compiled = {name: _gradient(loss, case.arrays) for name, loss in case.losses.items()}
        for name, one in compiled.items():
            temporary[f"{case.name}: {name}"] = one.memory_analysis().temp_size_in_bytes
        runs = {name: _timed(one, case.arrays) for name, one in compiled.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                seconds[name].append(run())
        fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
        for name, found in seconds.items():
            ratios = [ours / least for ours, least in zip(found, seconds[fastest], strict=True)]
            label, goal = (f"{name}, taken", NEAR) if name == case.taken else (name, "")
            quantities.append(Quantity(f"{case.name}: {label}", f"of {fastest}", ratios, goal))
            milliseconds[f"{case.name}: {name}"] = [1e3 * one for one in found]
    details = {"pass": "forward and backward", "milliseconds": milliseconds, "temporary_bytes": temporary}
    return Result("kernels", device_word(), quantities, dataclasses.asdict(sizes) | details)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Every operation of `layers.kernels` that computes, and the chunks of the cross-entropy, at each length."""
    for length in sizes.lengths:
        held = length <= sizes.whole
        attend = (*FLASH[kernels.platform()], "blocked", "chunked", *(("xla",) if held else ()))
        yield from _chosen("attention", length, attend, _attention, _heads(sizes, length))
        yield from _chosen("recurrence", length, ("scan", "grouped"), _recurrence, _decayed(sizes, length))
        if held:
            loss, arrays = _dual_chunk(sizes, length)
            yield from _chosen("dual_chunk", length, ("whole", "chunked"), loss, arrays)
        yield _cross_entropy(sizes, length)
    for tokens in (sizes.tokens // 8, sizes.tokens):
        yield from _chosen("grouped_matmul", tokens, ("blocked", "ragged_dot"), _grouped, _experts(sizes, tokens))


def _chosen(op: str, length: int, names: tuple[str, ...], loss: Callable, arrays: tuple) -> Iterator[Case]:
    """The case of an operation that picks among these; none at a length where there is nothing to pick."""
    kernels.forget()
    jax.eval_shape(loss, *arrays)
    taken = [name for found, name, _ in kernels.report() if found == op]
    if taken:
        yield Case(f"{op}, {length}", arrays, {name: _choosing(op, name, loss) for name in names}, taken[0])


def _choosing(op: str, name: str, loss: Callable) -> Callable:
    def chosen(*arrays):
        with kernels.choose(op, name):
            return loss(*arrays)

    return chosen


def _gradient(loss: Callable, arrays: tuple) -> jax.stages.Compiled:
    """The gradient by all floating arrays."""
    floating = tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(jax.tree.leaves(x)[0].dtype, jnp.floating))
    return jax.jit(jax.grad(loss, floating)).lower(*arrays).compile()


def _timed(gradient: jax.stages.Compiled, arrays: tuple) -> Callable[[], float]:
    """A call, which has been made once, that returns its seconds."""

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradient(*arrays))
        return time.perf_counter() - began

    run()
    return run


def _normal(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def _square(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(y.astype(jnp.float32)))


def _heads(sizes: Sizes, length: int) -> tuple[jax.Array, ...]:
    shape = (sizes.tokens // length, length, sizes.heads, sizes.head_dim)
    return tuple(_normal(seed, shape, sizes.dtype) for seed in range(3))


def _attention(q_BTHK, k_BTHK, v_BTHK):
    return _square(kernels.attention(q_BTHK, k_BTHK, v_BTHK, scale=q_BTHK.shape[-1] ** -0.5, causal=True))


def _decayed(sizes: Sizes, length: int) -> tuple[jax.Array, ...]:
    decay_BTH = -jnp.abs(_normal(3, (sizes.tokens // length, length, sizes.heads), "float32", 0.1))
    return *_heads(sizes, length), decay_BTH


def _recurrence(q_BTHN, k_BTHN, v_BTHK, decay_BTH):
    return _square(recurrence(q_BTHN, k_BTHN, v_BTHK, log_decay=decay_BTH)[0])


def _dual_chunk(sizes: Sizes, length: int) -> tuple[Callable, tuple]:
    chunk, local = max(length // 4, 1), max(length // 8, 1)
    knobs = {"heads": sizes.heads, "chunk": chunk, "local": local, "trained_length": chunk + local, "rope": RoPE}
    graph, params = nnx.split(DualChunk(sizes.dim, **knobs, rngs=nnx.Rngs(params=0)))
    params = jax.tree.map(lambda p: p.astype(sizes.dtype), params)

    def loss(params, x_BTD):
        return _square(nnx.merge(graph, params)(x_BTD, Context.of(x_BTD[..., 0]))[0])

    return loss, (params, _normal(0, (sizes.tokens // length, length, sizes.dim), sizes.dtype))


def _experts(sizes: Sizes, tokens: int) -> tuple[jax.Array, ...]:
    """Tokens, weights, and how many tokens each expert has: as a router that knows nothing yet would send them."""
    counts = np.random.default_rng(1).multinomial(tokens, [1 / sizes.experts] * sizes.experts)
    w_EIO = _normal(2, (sizes.experts, sizes.dim, sizes.width), sizes.dtype, sizes.dim**-0.5)
    return _normal(0, (tokens, sizes.dim), sizes.dtype), w_EIO, jnp.asarray(counts, jnp.int32)


def _grouped(x_MI, w_EIO, sizes_E):
    return _square(grouped_matmul(x_MI, w_EIO, sizes_E))


def _cross_entropy(sizes: Sizes, length: int) -> Case:
    """Chunks of a quarter of the usual length, the usual one and four times it, but no more than the row."""
    rows = sizes.tokens // length
    usual = chunk_length(rows, length, sizes.vocab)
    hidden_BTD = _normal(0, (rows, length, sizes.dim), sizes.dtype)
    w_DV = _normal(1, (sizes.dim, sizes.vocab), sizes.dtype, sizes.dim**-0.5)
    targets_BT = jnp.asarray(np.random.default_rng(2).integers(0, sizes.vocab, (rows, length)), jnp.int32)
    lengths = sorted({max(usual // 4, 1), usual, min(4 * usual, length)})
    losses = {f"chunks of {chunk}": functools.partial(_nats, chunk) for chunk in lengths}
    return Case(f"cross_entropy, {length}", (hidden_BTD, w_DV, targets_BT), losses, f"chunks of {usual}")


def _nats(chunk, hidden_BTD, w_DV, targets_BT):
    logits = functools.partial(_logits, w_DV)
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32)
    return cross_entropy(logits, hidden_BTD, targets_BT, weights_BT, z_loss=0.0, chunk=chunk)[0]


def _logits(w_DV, hidden_BTD):
    return jnp.einsum("btd,dv->btv", hidden_BTD, w_DV, preferred_element_type=jnp.float32)
