"""StarCoder2 (arXiv 2402.19173)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from layers.mlp import MLP
from layers.norm import LayerNorm
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Transposed
from maxlike.convert.structure import Structure
from maxlike.convert.tensors import BIAS, Rule


class Starcoder2(Family):
    """LayerNorm and biases everywhere, rotary grouped-query attention with a window, a plain GELU feed-forward."""

    architectures = ("Starcoder2ForCausalLM",)
    model_type = "starcoder2"
    defaults: ClassVar = {"num_key_value_heads": 2}
    tensors = (
        *decoder.EMBEDDINGS,
        *decoder.ATTENTION,
        *decoder.PRE_NORMS,
        *(
            Rule(f"{decoder.LAYER}mlp.{name}.{kind}", f"{decoder.OURS}ffn/{part}/{ours}", form)
            for name, part in (("c_fc", "up"), ("c_proj", "down"))
            for kind, ours, form in (("weight", "kernel", Transposed()), ("bias", "bias", BIAS))
        ),
    )

    def network(self, config: ConfigJson) -> Callable:
        config.expect("mlp_type", "default")
        config.expect("norm_type", "layer_norm")
        config.ignore(
            "activation_function", "multi_query", "scale_attn_weights"
        )  # of its predecessor: nothing reads them
        config.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "layer_norm_epsilon")
        bias, window = config.take("use_bias", True), config.take("sliding_window", None)
        rope = decoder.rope(config)
        mixer = decoder.attention(config, rope=rope, qkv_bias=bias, out_bias=bias, window=window)
        activation = config.choose("hidden_act", decoder.ACTIVATIONS, "gelu_pytorch_tanh")
        ffn = functools.partial(MLP, width=config.size("intermediate_size"), activation=activation, bias=bias)
        norm = functools.partial(LayerNorm, eps=config.take("norm_epsilon", 1e-5))
        block = functools.partial(Block, mixer=mixer, ffn=ffn, norm=norm)
        return decoder.language_model(config, [block] * config.size("num_hidden_layers"), norm, tied=True)

    def config(self, net: Structure) -> dict[str, Any]:
        return decoder.sizes_config(net) | {
            "intermediate_size": net.shape("stack/0/ffn/up/kernel")[-1],
            "hidden_act": decoder.activation_config(net),
            "norm_epsilon": net.value("norm/eps"),
            "use_bias": net.has("stack/0/mixer/query/bias"),
            "sliding_window": net.value("stack/0/mixer/window"),
        }
