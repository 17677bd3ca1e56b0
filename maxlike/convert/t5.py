"""T5, v1.0 and v1.1."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from layers.embed import Head
from layers.encoder_decoder import EncoderDecoder
from layers.mlp import MLP, GatedMLP
from layers.norm import RMSNorm
from layers.relative_attention import CrossAttention, RelativeAttention, RelativeBias
from layers.stack import Stack
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule, mixes_by

F = functools.partial
PROJECTIONS = {"q": ("query", 1), "k": ("key", 1), "v": ("value", 1), "o": ("out", 2)}


def _gated(net: Structure, layer: str) -> bool:
    return net.has(f"{layer}/ffn/gate/kernel")


def _attention(theirs: str, ours: str, mixer: str, norm: str) -> tuple[Rule, ...]:
    """An attention and the norm before it."""
    where = mixes_by(mixer)
    return (
        *(
            Rule(f"{theirs}.{name}.weight", f"{ours}/mixer/{part}/kernel", Transposed(inputs), where=where)
            for name, (part, inputs) in PROJECTIONS.items()
        ),
        Rule(f"{norm}.layer_norm.weight", f"{ours}/mixer_norm/gain", BIAS, where=where),
    )


def _feed_forward(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.DenseReluDense.wi_0.weight", f"{ours}/ffn/gate/kernel"),
        Rule(f"{theirs}.DenseReluDense.wi_1.weight", f"{ours}/ffn/up/kernel", where=_gated),
        Rule(f"{theirs}.DenseReluDense.wi.weight", f"{ours}/ffn/up/kernel", where=lambda *at: not _gated(*at)),
        Rule(f"{theirs}.DenseReluDense.wo.weight", f"{ours}/ffn/down/kernel"),
        Rule(f"{theirs}.layer_norm.weight", f"{ours}/ffn_norm/gain", BIAS),
    )


READ, WRITE = "encoder.block.{i}.layer", "decoder.block.{pair}.layer"


class T5(Family):
    """T5 (arXiv 1910.10683): v1.0 with a tied, scaled head, v1.1 with gates and a head of its own. A layer of its
    decoder is two blocks here: self-attention, then attention on the source with the feed-forward."""

    architectures = ("T5ForConditionalGeneration",)
    model_type = "t5"
    length_key = None
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)  # of old files
    tied: ClassVar = {
        f"{name}.weight": "shared.weight" for name in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
    }
    tensors = (
        Rule("shared.weight", "embed/table", TABLE),
        Rule("lm_head.weight", "head/linear/kernel"),
        *(
            rule
            for side in ("encoder", "decoder")
            for rule in (
                Rule(f"{side}.final_layer_norm.weight", f"{side}_norm/gain", BIAS),
                Rule(
                    f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{side}_bias/table", TABLE
                ),
            )
        ),
        *_attention(f"{READ}.0.SelfAttention", "encoder/{i}", "RelativeAttention", f"{READ}.0"),
        *_feed_forward(f"{READ}.1", "encoder/{i}"),
        *_attention(f"{WRITE}.0.SelfAttention", "decoder/{i}", "RelativeAttention", f"{WRITE}.0"),
        *_attention(f"{WRITE}.1.EncDecAttention", "decoder/{i}", "CrossAttention", f"{WRITE}.1"),
        *_feed_forward(f"{WRITE}.2", "decoder/{i}"),
    )

    def network(self, config: ConfigJson) -> Callable:
        config.ignore(
            "dropout_rate", "classifier_dropout", "n_positions", "output_past", "dense_act_fn", "is_gated_act"
        )
        config.expect("is_encoder_decoder", True)
        dim, heads, depth = config.size("d_model"), config.size("num_heads"), config.size("num_layers")
        knobs = {"heads": heads, "head_dim": config.size("d_kv")}
        norm, ffn = F(RMSNorm, eps=config.take("layer_norm_epsilon", 1e-6)), _ffn(config)
        block = F(Block, norm=norm)
        reading = F(block, mixer=F(RelativeAttention, **knobs, causal=False), ffn=ffn)
        writing = F(block, mixer=F(RelativeAttention, **knobs), ffn=None)
        looking = F(block, mixer=F(CrossAttention, **knobs, scale=1.0), ffn=ffn)
        bias = F(
            RelativeBias,
            heads=heads,
            buckets=config.size("relative_attention_num_buckets", 32),
            max_distance=config.size("relative_attention_max_distance", 128),
        )
        tied = config.take("tie_word_embeddings", True)
        scaled = config.take("scale_decoder_outputs", tied)  # older files: the tied head is the scaled one
        return F(
            EncoderDecoder,
            vocab=config.size("vocab_size"),
            dim=dim,
            encoder=F(Stack, pattern=(reading,), depth=depth),
            decoder=F(Stack, pattern=(writing, looking), depth=2 * config.size("num_decoder_layers", depth)),
            norm=norm,
            head=F(Head, tied=tied, scale=dim**-0.5 if scaled else 1.0),
            bias=bias,
        )

    def config(self, net: Structure) -> dict[str, Any]:
        dim, heads, head_dim = net.shape("encoder/0/mixer/query/kernel")
        activation, gated = net.value("encoder/0/ffn/activation"), _gated(net, "encoder/0")
        words = {word: name for name, word in _activations(gated).items()}
        if activation not in words:
            raise Cannot(f"the activation {activation!r} has no word in feed_forward_proj")
        tied = not net.has("head/linear/kernel")
        return {
            "vocab_size": net.value("vocab"),
            "d_model": dim,
            "d_kv": head_dim,
            "d_ff": net.shape("encoder/0/ffn/up/kernel")[1],
            "num_heads": heads,
            "num_layers": net.depth("encoder"),
            "num_decoder_layers": net.depth("decoder") // 2,
            "relative_attention_num_buckets": net.value("encoder_bias/buckets"),
            "relative_attention_max_distance": net.value("encoder_bias/max_distance"),
            "layer_norm_epsilon": net.value("encoder_norm/eps"),
            "feed_forward_proj": words[activation],
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": net.value("head/scale") != 1.0,
            "is_encoder_decoder": True,
        }


def _activations(gated: bool) -> dict[str, str]:
    """Our activations by their words in `feed_forward_proj`, where "gated-gelu" means the tanh one."""
    if not gated:
        return decoder.ACTIVATIONS
    return {f"gated-{name}": word for name, word in decoder.ACTIVATIONS.items()} | {"gated-gelu": "gelu_tanh"}


def _ffn(config: ConfigJson) -> Callable:
    activation = config.choose("feed_forward_proj", _activations(True) | _activations(False), "relu")
    gated = config.take("feed_forward_proj", "relu").startswith("gated-")
    return F(GatedMLP if gated else MLP, width=config.size("d_ff"), activation=activation)
