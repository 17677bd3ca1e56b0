"""Llama 2, 3, 3.1 and what is written as Llama (Yi, SmolLM2), and Mistral with its sliding window."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.structure import Structure


class Llama(Family):
    """Pre-norm RMSNorm, rotary grouped-query attention, SwiGLU (arXiv 2307.09288, 2407.21783; Yi: 2403.04652)."""

    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM", "YiForCausalLM")
    model_type = "llama"
    tensors = (*decoder.EMBEDDINGS, *decoder.ATTENTION, *decoder.GATED_MLP, *decoder.PRE_NORMS)

    def network(self, config: ConfigJson) -> Callable:
        config.expect("rope_interleaved", False)
        config.ignore("is_llama_config")
        bias = config.take("attention_bias", False)
        mixer = decoder.attention(config, rope=decoder.rope(config), qkv_bias=bias, out_bias=bias)
        ffn = decoder.gated_mlp(config, bias=config.take("mlp_bias", False))
        norm = decoder.rms_norm(config)
        block = functools.partial(Block, mixer=mixer, ffn=ffn, norm=norm)
        return decoder.language_model(config, [block] * config.size("num_hidden_layers"), norm)

    def config(self, net: Structure) -> dict[str, Any]:
        return decoder.config(net) | {
            "attention_bias": net.has("stack/0/mixer/query/bias"),
            "mlp_bias": net.has("stack/0/ffn/up/bias"),
        }


class Mistral(Family):
    """Llama without biases, with a sliding window in every layer (arXiv 2310.06825)."""

    architectures = ("MistralForCausalLM",)
    model_type = "mistral"
    defaults: ClassVar = {"sliding_window": 4096, "num_key_value_heads": 8}
    tensors = Llama.tensors

    def network(self, config: ConfigJson) -> Callable:
        window = config.take("sliding_window", None)
        mixer = decoder.attention(config, rope=decoder.rope(config), window=window)
        norm = decoder.rms_norm(config)
        block = functools.partial(Block, mixer=mixer, ffn=decoder.gated_mlp(config), norm=norm)
        return decoder.language_model(config, [block] * config.size("num_hidden_layers"), norm)

    def config(self, net: Structure) -> dict[str, Any]:
        return decoder.config(net) | {"sliding_window": net.value("stack/0/mixer/window")}
