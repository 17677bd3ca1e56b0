"""Every part of `layers` is bound by gin somewhere: in a shipped file, or in one line here.

A new part that no shipped file binds joins by one line in BOUND; one that other parts make by themselves, in INSIDE.
"""

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import numpy as np
import pytest

import experiments
import layers
from maxlike import config
from maxlike.bench.timed import random_batch

# Their makers pass their knobs on, or have no use for other ones.
INSIDE = {
    "axes.Buffer",
    "conv.ShortConv",
    "image_convolutions.Convolution",
    "linear.Linear",
    "modality_moe.ExpertGroup",
    "multi_token.MultiTokenModule",
}
B, T = 2, 16
TINY = ("dim = 16", "depth = 2", "heads = 2", "width = 32")
SHAPE = (f"experiment.Experiment.batch_size = {B}", f"experiment.Experiment.sequence_length = {T}")
MIXER = "block.Block.mixer = @"
QUANTIZER = "image_tokenizer.ImageTokenizer.quantizer = @"
RECTANGLE = np.ones((B, T), np.int32)
PREFIX = {"prefix": np.arange(T) < RECTANGLE * 4}
BLOCKS = PREFIX | {"blocks": np.maximum(np.arange(T) - 3, 0) * RECTANGLE}
SOURCE = {"sources": RECTANGLE, "source_positions": np.arange(T) * RECTANGLE, "source_segment_ids": RECTANGLE}
PICTURES = {"pictures": np.zeros((B, 32, 32, 3), np.uint8), "loss_weights": np.ones(B, np.float32)}


@dataclasses.dataclass(frozen=True)
class On:
    """The experiment that a line goes on, a small size of it, and what its batches have besides text."""

    experiment: str
    size: tuple[str, ...]
    batch: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


DENSE = On("families/transformer", TINY)
SPARSE = On("families/moe", (*TINY, "expert_width = 16"))
PAINTER = On("image_tokenizer", ("width = 16",), PICTURES)
TRANSLATOR = (
    "experiment.Experiment.model = @encoder_decoder.EncoderDecoder; "
    "encoder_decoder.EncoderDecoder.vocab = %vocab; encoder_decoder.EncoderDecoder.dim = %dim; "
    "encoder_decoder.EncoderDecoder.encoder = @source/stack.Stack; "
    "source/stack.Stack.pattern = (@source/block.Block,); "
    "encoder_decoder.EncoderDecoder.decoder = @stack.Stack; stack.Stack.pattern = (@block.Block, @cross/block.Block); "
    "encoder_decoder.EncoderDecoder.norm = @norm.RMSNorm; "
    "encoder_decoder.EncoderDecoder.bias = @relative_attention.RelativeBias; "
    "relative_attention.RelativeBias.heads = 2; "
    "block.Block.mixer = @relative_attention.RelativeAttention; relative_attention.RelativeAttention.heads = 2; "
    "source/block.Block.mixer = @source/relative_attention.RelativeAttention; "
    "source/relative_attention.RelativeAttention.causal = False; cross/block.Block.ffn = None; "
    "cross/block.Block.mixer = @relative_attention.CrossAttention; relative_attention.CrossAttention.heads = 2"
)
BOUND = {
    "delta_net": (DENSE, MIXER + "delta_net.DeltaNet; delta_net.DeltaNet.heads = 2"),
    "gated_delta_net": (
        DENSE,
        MIXER + "gated_delta_net.GatedDeltaNet; gated_delta_net.GatedDeltaNet.heads = 2; "
        "gated_delta_net.GatedDeltaNet.norm = @gated_norm.GatedRMSNorm; "
        "gated_norm.GatedRMSNorm.norm_before_gate = True",
    ),
    "gated_linear_attention": (
        DENSE,
        MIXER + "gated_linear_attention.GatedLinearAttention; gated_linear_attention.GatedLinearAttention.heads = 2",
    ),
    "retention": (DENSE, MIXER + "retention.Retention; retention.Retention.heads = 2"),
    "dual_chunk": (
        DENSE,
        MIXER + "dual_chunk.DualChunk; dual_chunk.DualChunk.heads = 2; dual_chunk.DualChunk.rope = @rope.RoPE; "
        "dual_chunk.DualChunk.chunk = 8; dual_chunk.DualChunk.local = 4; dual_chunk.DualChunk.trained_length = 12",
    ),
    "encoder_decoder": (dataclasses.replace(DENSE, batch=SOURCE), TRANSLATOR),
    "linear_scaling": (DENSE, "rope.RoPE.scaling = @rope.LinearScaling; rope.LinearScaling.factor = 4.0"),
    "ntk_scaling": (DENSE, "rope.RoPE.scaling = @rope.NTKScaling; rope.NTKScaling.factor = 4.0"),
    "llama3_scaling": (
        DENSE,
        "rope.RoPE.scaling = @rope.Llama3Scaling; rope.Llama3Scaling.factor = 8.0; "
        "rope.Llama3Scaling.original_length = 8192",
    ),
    "blanks": (
        dataclasses.replace(DENSE, batch=BLOCKS),
        "attention.Attention.rope = @rope2d.RoPE2D; language_model.LanguageModel.prompt = 'blank'",
    ),
    "prefix": (dataclasses.replace(DENSE, batch=PREFIX), "language_model.LanguageModel.prompt = 'prefix'"),
    "deepnorm": (
        DENSE,
        "block.Block.order = 'deepnorm'; block.Block.skip_scale = 2.0; attention.Attention.branch_gain = 0.5",
    ),
    "multi_token": (
        DENSE,
        "language_model.LanguageModel.mtp = @multi_token.MultiToken; multi_token.MultiToken.block = @block.Block; "
        "multi_token.MultiToken.norm = @norm.RMSNorm; experiment.Experiment.objective = @ahead.MultiToken()",
    ),
    "device_balance": (
        SPARSE,
        "moe.MoE.losses = (@balance.DeviceBalance,); balance.DeviceBalance.groups = 2; "
        "balance.DeviceBalance.target = 2",
    ),
    "pooled_balance": (
        SPARSE,
        "moe.MoE.losses = (@pooled_balance.PooledBalance,); pooled_balance.PooledBalance.coefficient = 1e-3",
    ),
    "z_loss": (SPARSE, "moe.MoE.losses = (@balance.ZLoss,); balance.ZLoss.coefficient = 1e-3"),
    "capacity": (SPARSE, "moe.MoE.dispatch = @dispatch.Capacity; dispatch.Capacity.priority = 'probability'"),
    "dropless": (SPARSE, "moe.MoE.dispatch = @dispatch.Dropless; dispatch.Dropless.exchange = 'gather'"),
    "expert_choice": (
        SPARSE,
        "sparse/block.Block.ffn = @expert_choice.ExpertChoice; expert_choice.ExpertChoice.allow_noncausal = True; "
        "expert_choice.ExpertChoice.experts = @experts.Experts; attention.Attention.causal = False; "
        "experiment.Experiment.objective = @masked_tokens.MaskedTokens(); masked_tokens.MaskedTokens.mask_id = 0",
    ),
    "convolutions": (
        PAINTER,
        "image_tokenizer.ImageTokenizer.encoder = @image_convolutions.ConvEncoder; "
        "image_tokenizer.ImageTokenizer.decoder = @image_convolutions.ConvDecoder; "
        "image_convolutions.ConvEncoder.width = 8; image_convolutions.ConvDecoder.width = 8",
    ),
    "lfq": (PAINTER, QUANTIZER + "quantizers.LFQ; quantizers.LFQ.bits = 4"),
    "bsq": (PAINTER, QUANTIZER + "quantizers.BSQ; quantizers.BSQ.bits = 4"),
    "vq": (PAINTER, QUANTIZER + "codebooks.VQ; codebooks.VQ.size = 8; codebooks.VQ.dim = 4"),
    "ibq": (PAINTER, QUANTIZER + "codebooks.IBQ; codebooks.IBQ.size = 8; codebooks.IBQ.dim = 4"),
    "residual_vq": (
        PAINTER,
        QUANTIZER + "codebooks.RVQ; codebooks.RVQ.books = 2; codebooks.RVQ.book = @codebooks.VQEMA; "
        "codebooks.VQEMA.size = 8; codebooks.VQEMA.dim = 4",
    ),
}
ELSEWHERE = {
    "ahead": "from maxlike.objectives import multi_token as ahead",
    "masked_tokens": "from maxlike.objectives import masked_tokens",
    "experiment": "from maxlike import experiment",
}


def overlay(text: str) -> str:
    """A gin file of bindings that are separated by semicolons, with the imports that they need."""
    modules = dict.fromkeys(re.findall(r"(\w+)\.[A-Z]\w*", text))
    imports = [ELSEWHERE.get(module, f"from layers import {module}") for module in modules]
    return "\n".join(["from __gin__ import dynamic_registration", *imports, *text.split("; ")]) + "\n"


@pytest.mark.parametrize("name", BOUND)
def test_a_line_of_gin_puts_the_part_into_a_network(name, tmp_path):
    on, text = BOUND[name]
    path = tmp_path / "part.gin"
    path.write_text(overlay(text))
    experiment = config.load(on.experiment, overlays=[str(path)], bindings=[*on.size, *SHAPE])
    batch = random_batch(experiment, experiment.bare().vocab) | on.batch

    def loss(params, buffers, batch):
        key = jax.random.key(0)
        return experiment.step.loss(params, buffers, batch, key, experiment.abstract_model(), experiment.objective)

    model = experiment.abstract_model()
    mean, metrics = jax.eval_shape(loss, model.params, model.buffers, batch)
    assert mean.total.shape == () and "loss" in metrics


def parts() -> set[str]:
    """Every public class of `layers` whose constructor has knobs."""
    found = set()
    for module in pkgutil.iter_modules(layers.__path__):
        classes = vars(importlib.import_module(f"layers.{module.name}")).values()
        for part in filter(inspect.isclass, classes):
            knobs = [p for p in inspect.signature(part.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
            here = part.__module__ == f"layers.{module.name}" and not part.__name__.startswith("_")
            if here and {p.name for p in knobs} - {"rngs"}:
                found.add(f"{module.name}.{part.__name__}")
    return found


def test_no_part_is_bound_nowhere():
    files = pathlib.Path(experiments.__file__).parent.rglob("*.gin")
    lines = [line.split("#")[0] for path in files for line in path.read_text().splitlines()]
    bound = set(re.findall(r"\b\w+\.[A-Z]\w*", "\n".join([*lines, *(text for _, text in BOUND.values())])))
    assert parts() - bound == INSIDE, "bind it in a shipped file or in a line of BOUND, or say in INSIDE who makes it"
