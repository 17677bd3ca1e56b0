"""What every layer gives, out of a forward pass that runs as it always does: scanned, rematerialised, on any mesh."""

import copy
from typing import Any

import jax
from flax import nnx

from layers.context import Context
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from layers.stack import Stack
from maxlike.objectives.batch import context_of

OUTPUT = "watched/output"


class Watched(nnx.Module):
    """A block that also reports its output x [B, T, D] among its metrics, on which Stack puts a dimension of depth."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        y_BTD, aux = self.block(x_BTD, ctx)
        return y_BTD, aux | {OUTPUT: y_BTD}


def outputs(network: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{name: [B, T, ...]} in order of depth: each layer's output, the final hidden states, the logits. Empty for a
    network that is no language model."""
    if not isinstance(network, LanguageModel | EncoderDecoder):
        return {}
    out = watched(network)(batch["inputs"], context_of(batch, None))
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(out.aux)[0]:
        *stack, name = (str(key.key) for key in path)
        if name == OUTPUT and leaf.shape[1:] == out.hidden_BTD.shape:  # a pipeline gives means over micro-batches
            found |= {f"{'/'.join([*stack, 'stack'])}/{layer}": leaf[layer] for layer in range(leaf.shape[0])}
    return found | {"hidden states": out.hidden_BTD, "logits": network.logits(out.hidden_BTD)}


def watched(network: Any) -> Any:
    """The network with every block of its stacks Watched."""
    seen = copy.copy(network)
    for name, part in vars(network).items():
        if isinstance(part, Stack):
            stack = copy.copy(part)
            for blocks in ("prefix", "periods", "suffix"):
                setattr(stack, blocks, nnx.List([Watched(block) for block in vars(part)[blocks]]))
            setattr(seen, name, stack)
    return seen
