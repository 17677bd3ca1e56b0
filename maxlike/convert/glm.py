"""GLM-4: the layout of glm-4-9b (model type glm), and of the 0414 checkpoints (glm4) with norms on both sides."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from layers.block import Block
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Fused, Transposed
from maxlike.convert.structure import Structure
from maxlike.convert.tensors import BIAS, Rule

FUSED_MLP = (
    Rule(
        f"{decoder.LAYER}mlp.gate_up_proj.weight",
        (f"{decoder.OURS}ffn/gate/kernel", f"{decoder.OURS}ffn/up/kernel"),
        Fused(Transposed()),
    ),
    Rule(f"{decoder.LAYER}mlp.down_proj.weight", f"{decoder.OURS}ffn/down/kernel"),
)


class Glm(Family):
    """Biases on queries, keys and values, few key heads, half of each head rotated in interleaved pairs, gate and up in
    one matrix (arXiv 2406.12793)."""

    architectures = ("GlmForCausalLM",)
    model_type = "glm"
    defaults: ClassVar = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07}
    tensors = (*decoder.EMBEDDINGS, *decoder.ATTENTION, *FUSED_MLP, *decoder.PRE_NORMS)
    order: Literal["pre", "sandwich"] = "pre"

    def network(self, config: ConfigJson) -> Callable:
        rope = decoder.rope(config, layout="interleaved", fraction=0.5)
        mixer = decoder.attention(config, rope=rope, qkv_bias=config.take("attention_bias", True))
        norm = decoder.rms_norm(config)
        block = functools.partial(Block, mixer=mixer, ffn=decoder.gated_mlp(config), norm=norm, order=self.order)
        return decoder.language_model(config, [block] * config.size("num_hidden_layers"), norm)

    def config(self, net: Structure) -> dict[str, Any]:
        keys = decoder.config(net)
        fraction = {"partial_rotary_factor": net.value("stack/0/mixer/rope").fraction}
        return keys | fraction | {"attention_bias": net.has("stack/0/mixer/query/bias")}


class Glm4(Glm):
    """Glm with a norm behind each branch too."""

    architectures = ("Glm4ForCausalLM",)
    model_type = "glm4"
    tensors = (
        *Glm.tensors,
        Rule(f"{decoder.LAYER}post_self_attn_layernorm.weight", f"{decoder.OURS}mixer_out_norm/gain", BIAS),
        Rule(f"{decoder.LAYER}post_mlp_layernorm.weight", f"{decoder.OURS}ffn_out_norm/gain", BIAS),
    )
    order = "sandwich"
