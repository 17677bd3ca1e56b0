"""BERT as an encoder of sentences (MiniLM, sentence transformers)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.attention import Attention
from layers.block import Block
from layers.embed import Embed
from layers.mlp import MLP
from layers.norm import LayerNorm
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule

LAYER, OURS = "encoder.layer.{i}.", "stack/{i}/"
LINEARS = {
    "attention.self.query": ("mixer/query", 1),
    "attention.self.key": ("mixer/key", 1),
    "attention.self.value": ("mixer/value", 1),
    "attention.output.dense": ("mixer/out", 2),
    "intermediate.dense": ("ffn/up", 1),
    "output.dense": ("ffn/down", 1),
}
NORMS = {
    "embeddings.LayerNorm": "embed/norm",
    f"{LAYER}attention.output.LayerNorm": f"{OURS}mixer_norm",
    f"{LAYER}output.LayerNorm": f"{OURS}ffn_norm",
}


class Bert(Family):
    """The encoder of BERT (arXiv 1810.04805): norms after each branch, learned positions, its last hidden states.

    A text of one segment: the vector of the first token type is part of every position, so it is added to the position
    table, and an export writes zeros for it. The pooler is no part of the encoder and is left behind.
    """

    architectures = ("BertModel",)
    model_type = "bert"
    prefix = "bert."
    ignored = (r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\.dense\.(weight|bias)")
    tied: ClassVar = {}
    length_key = None
    tensors = (
        Rule("bert.embeddings.word_embeddings.weight", "embed/table", TABLE),
        Rule(
            "bert.embeddings.position_embeddings.weight",
            "embed/positions",
            TABLE,
            added="bert.embeddings.token_type_embeddings.weight",
        ),
        *(
            Rule(f"bert.{LAYER}{name}.{kind}", f"{OURS}{path}/{part}", form)
            for name, (path, inputs) in LINEARS.items()
            for kind, part, form in (("weight", "kernel", Transposed(inputs)), ("bias", "bias", BIAS))
        ),
        *(
            Rule(f"bert.{name}.{kind}", f"{path}/{part}", BIAS)
            for name, path in NORMS.items()
            for kind, part in (("weight", "gain"), ("bias", "bias"))
        ),
    )

    def network(self, config: ConfigJson) -> Callable:
        config.ignore("type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        config.ignore("gradient_checkpointing", "tie_word_embeddings")
        config.expect("position_embedding_type", "absolute")
        config.expect("is_decoder", False)
        config.expect("add_cross_attention", False)
        heads = config.size("num_attention_heads")
        mixer = functools.partial(Attention, heads=heads, qkv_bias=True, out_bias=True, causal=False)
        activation = config.choose("hidden_act", decoder.ACTIVATIONS, "gelu")
        ffn = functools.partial(MLP, width=config.size("intermediate_size"), activation=activation, bias=True)
        norm = functools.partial(LayerNorm, eps=config.take("layer_norm_eps", 1e-12))
        block = functools.partial(Block, mixer=mixer, ffn=ffn, norm=norm, order="post")
        embed = functools.partial(Embed, positions=config.size("max_position_embeddings", 512), norm=norm)
        blocks = [block] * config.size("num_hidden_layers")
        return decoder.language_model(config, blocks, None, tied=True, embed=embed)

    def config(self, net: Structure) -> dict[str, Any]:
        dim, heads, _ = net.shape("stack/0/mixer/query/kernel")
        if net.value("stack/0/mixer/causal"):
            raise Cannot("the network is causal, BERT is not")
        return {
            "vocab_size": net.value("vocab"),
            "hidden_size": dim,
            "num_hidden_layers": net.depth(),
            "num_attention_heads": heads,
            "intermediate_size": net.shape("stack/0/ffn/up/kernel")[-1],
            "hidden_act": decoder.activation_config(net),
            "layer_norm_eps": net.value("embed/norm/eps"),
            "max_position_embeddings": net.shape("embed/positions")[0],
            "type_vocab_size": 2,
        }
