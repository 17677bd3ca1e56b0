"""Linear mixers against softmax attention, by length: seconds a token of the forward and backward pass."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import kernels
from layers.attention import Attention
from layers.context import Context
from layers.delta_net import DeltaNet
from layers.gated_linear_attention import GatedLinearAttention
from layers.linear_attention import LightningAttention
from layers.mamba2 import Mamba2
from layers.rope import RoPE
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import device_word
from maxlike.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: of a call, in rows of a length. flat: the two lengths whose time a token should be equal. against: the
    lengths at which softmax attention runs too, each with the goal for its time over the mixer's."""

    dim: int
    heads: int
    tokens: int
    dtype: str
    flat: tuple[int, int]
    against: tuple[tuple[int, str], ...]

    @property
    def lengths(self) -> list[int]:
        return sorted({*self.flat, *(length for length, _ in self.against)})


CPU = Sizes(dim=256, heads=4, tokens=16384, dtype="float32", flat=(1024, 16384), against=((4096, "> 1"),))
ACCELERATOR = Sizes(
    dim=1024, heads=8, tokens=65536, dtype="bfloat16", flat=(1024, 16384), against=((8192, ">= 1"), (32768, ">= 1.8"))
)
SOFTMAX = "softmax attention"


def mixers(sizes: Sizes) -> dict[str, functools.partial]:
    """What is compared, of one width and number of heads."""
    return {
        SOFTMAX: functools.partial(Attention, heads=sizes.heads, rope=RoPE),
        "lightning attention": functools.partial(LightningAttention, heads=sizes.heads),
        "gated linear attention": functools.partial(GatedLinearAttention, heads=sizes.heads),
        "delta net": functools.partial(DeltaNet, heads=sizes.heads),
        "mamba-2": functools.partial(Mamba2, chunk=64),  # the fastest on CPU; it changes nothing else
    }


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` rounds; in each, every mixer runs once at every length, in one process, so that what else the machine
    does falls on all alike. The experiment that the job was given, and its steps, do not matter here."""
    sizes = CPU if kernels.platform() == "cpu" else ACCELERATOR
    parts = mixers(sizes)
    linear = [name for name in parts if name != SOFTMAX]
    wanted = [(SOFTMAX, n) for n, _ in sizes.against] + [(name, n) for name in linear for n in sizes.lengths]
    cases = {(name, n): _case(parts[name], n, sizes) for name, n in wanted}
    micros: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for run in cases.values():
        run()
    for _ in range(repeats):
        for case, run in cases.items():
            micros[case].append(1e6 * run() / sizes.tokens)
    short, long = sizes.flat
    quantities = [
        Quantity(f"{name}: time a token, {long} / {short}", "", _ratios(micros, (name, long), (name, short)), "<= 1.15")
        for name in linear
    ]
    quantities += [
        Quantity(f"softmax attention / {name}, {n}", "", _ratios(micros, (SOFTMAX, n), (name, n)), goal)
        for n, goal in sizes.against
        for name in linear
    ]
    quantities += [Quantity(f"{name}, rows of {n}", "us a token", values) for (name, n), values in micros.items()]
    return Result("recurrence", device_word(), quantities, dataclasses.asdict(sizes) | {"pass": "forward and backward"})


def _ratios(micros, above, below) -> list[float]:
    return [a / b for a, b in zip(micros[above], micros[below], strict=True)]


def _case(part, length: int, sizes: Sizes):
    """A call that takes the gradient of one mixer by its input and its parameters, and returns its seconds."""
    graph, params = nnx.split(part(sizes.dim, rngs=nnx.Rngs(params=0)))
    params = jax.tree.map(lambda p: p.astype(sizes.dtype), params)
    shape = (sizes.tokens // length, length, sizes.dim)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), sizes.dtype)
    ctx = Context.of(x_BTD[..., 0])

    @jax.jit
    def gradient(params, x_BTD):
        def loss(params, x_BTD):
            return jnp.sum(jnp.square(nnx.merge(graph, params)(x_BTD, ctx)[0].astype(jnp.float32)))

        return jax.grad(loss, (0, 1))(params, x_BTD)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, x_BTD))
        return time.perf_counter() - began

    return run
