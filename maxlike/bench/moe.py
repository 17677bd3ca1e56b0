"""A mixture of experts against a dense model of the same active FLOPs: seconds a step; memory of a dropless layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.experts import Experts
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.routers import TopK
from layers.stack import Stack
from maxlike import config
from maxlike.bench.record import Quantity, Result
from maxlike.bench.timed import Steps, device_word
from maxlike.experiment import Experiment

DIM, DEPTH, HEADS, VOCAB, BATCH, LENGTH = 256, 4, 4, 4096, 4, 1024
EXPERTS, TOP_K, WIDTH = 8, 2, 512
SMALL, LARGE = 4096, 16384  # tokens


def feed_forwards() -> dict[str, functools.partial]:
    """A dense feed-forward, and experts of which a token passes as many channels."""
    experts = functools.partial(Experts, count=EXPERTS, width=WIDTH)
    return {
        "dense": functools.partial(GatedMLP, width=TOP_K * WIDTH),
        "moe": functools.partial(MoE, router=functools.partial(TopK, top_k=TOP_K), experts=experts),
    }


def experiments() -> dict[str, Experiment]:
    """The two models, which differ in the feed-forward alone, in the training step of a Llama on this device."""
    shape = [f"experiment.Experiment.batch_size = {BATCH}", f"experiment.Experiment.sequence_length = {LENGTH}"]
    base = config.load("llama_1b", overlays=["cpu"], bindings=[*shape, "step.Step.micro_batches = 1"])
    attention = functools.partial(Attention, heads=HEADS, rope=RoPE)
    made = {}
    for name, ffn in feed_forwards().items():
        block = functools.partial(Block, mixer=attention, ffn=ffn, norm=RMSNorm)
        stack = functools.partial(Stack, pattern=(block,), depth=DEPTH)
        model = functools.partial(LanguageModel, vocab=VOCAB, dim=DIM, stack=stack, norm=RMSNorm)
        made[name] = dataclasses.replace(base, model=model)
    return made


def measure(experiment: Experiment, repeats: int, steps: int) -> Result:
    """`repeats` x `steps` pairs of steps, one of each model in turn in one process, so that what else the machine does
    falls on both alike; the experiment that the job was given does not matter here."""
    pair = experiments()
    runs = {name: Steps(one) for name, one in pair.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats * steps):
        for name, run in runs.items():
            seconds[name].append(run())
    ratios = [
        float(np.median(seconds["moe"][i : i + steps]) / np.median(seconds["dense"][i : i + steps]))
        for i in range(0, repeats * steps, steps)
    ]
    flops = {name: one.bare().flops_per_token(LENGTH) for name, one in pair.items()}
    small, large = (gradient_bytes(tokens) for tokens in (SMALL, LARGE))
    quantities = [
        Quantity("step time, mixture / dense", "", ratios, "<= 1.25"),
        Quantity("fastest step, mixture / dense", "", [min(seconds["moe"]) / min(seconds["dense"])]),
        Quantity("active FLOPs, mixture / dense", "", [flops["moe"] / flops["dense"]]),
        Quantity("step, mixture", "s", seconds["moe"]),
        Quantity("step, dense", "s", seconds["dense"]),
        Quantity("memory a token of a dropless gradient, 4 times the tokens", "", [large / small / 4], "<= 1.05"),
    ]
    details = {
        "shape": {"dim": DIM, "depth": DEPTH, "experts": EXPERTS, "top_k": TOP_K, "width": WIDTH},
        "batch_tokens": BATCH * LENGTH,
        "gradient_bytes": {str(SMALL): small, str(LARGE): large},
    }
    return Result("moe", device_word(), quantities, details)


def gradient_bytes(tokens: int) -> int:
    """Temporary memory of the gradient of one mixture of experts by its input and its parameters, as compiled."""
    ffn = feed_forwards()["moe"]
    graph, params = jax.eval_shape(lambda: nnx.split(ffn(DIM, rngs=nnx.Rngs(params=0))))

    def loss(params, x_BTD):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x_BTD, Context.of(x_BTD[..., 0]))[0]))

    x_BTD = jax.ShapeDtypeStruct((1, tokens, DIM), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x_BTD).compile()
    return compiled.memory_analysis().temp_size_in_bytes
