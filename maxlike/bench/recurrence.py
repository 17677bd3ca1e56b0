"""Linear mixers against softmax attention, by length: seconds a token of the forward and backward pass."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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

DIM, HEADS, TOKENS = 256, 4, 16384  # a call has TOKENS tokens: rows of 1 K, 4 K or 16 K
SHORT, MIDDLE, LONG = 1024, 4096, 16384
SOFTMAX = "softmax attention"
MIXERS = {
    SOFTMAX: functools.partial(Attention, heads=HEADS, rope=RoPE),
    "lightning attention": functools.partial(LightningAttention, heads=HEADS),
    "gated linear attention": functools.partial(GatedLinearAttention, heads=HEADS),
    "delta net": functools.partial(DeltaNet, heads=HEADS),
    "mamba-2": Mamba2,
}


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` rounds; in each, every mixer runs once at every length, in one process, so that what else the machine
    does falls on all alike. Softmax attention is left out at 16 K. The experiment that the job was given, and its
    steps, do not matter here."""
    cases = {(name, n): _case(part, n) for name, part in MIXERS.items() for n in (SHORT, MIDDLE, LONG)}
    del cases[SOFTMAX, LONG]
    micros: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for run in cases.values():
        run()
    for _ in range(repeats):
        for case, run in cases.items():
            micros[case].append(1e6 * run() / TOKENS)
    linear = [name for name in MIXERS if name != SOFTMAX]
    quantities = [
        Quantity(f"{name}: time a token, 16 K / 1 K", "", _ratios(micros, (name, LONG), (name, SHORT)), "<= 1.15")
        for name in linear
    ]
    quantities += [
        Quantity(f"softmax attention / {name}, 4 K", "", _ratios(micros, (SOFTMAX, MIDDLE), (name, MIDDLE)), "> 1")
        for name in linear
    ]
    quantities += [Quantity(f"{name}, rows of {n}", "us a token", values) for (name, n), values in micros.items()]
    details = {"dim": DIM, "heads": HEADS, "tokens_a_call": TOKENS, "dtype": "float32", "pass": "forward and backward"}
    return Result("recurrence", device_word(), quantities, details)


def _ratios(micros, above, below) -> list[float]:
    return [a / b for a, b in zip(micros[above], micros[below], strict=True)]


def _case(part, length: int):
    """A call that takes the gradient of one mixer by its input and its parameters, and returns its seconds."""
    graph, params = nnx.split(part(DIM, rngs=nnx.Rngs(params=0)))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((TOKENS // length, length, DIM)), jnp.float32)
    ctx = Context.of(x_BTD[..., 0])

    @jax.jit
    def gradient(params, x_BTD):
        return jax.grad(lambda params, x_BTD: jnp.sum(jnp.square(nnx.merge(graph, params)(x_BTD, ctx)[0])), (0, 1))(
            params, x_BTD
        )

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, x_BTD))
        return time.perf_counter() - began

    return run
