"""Qwen3-Next."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.attention_gate import AttentionGate
from layers.block import Block
from layers.gated_delta_net import GatedDeltaNet
from layers.gated_norm import GatedRMSNorm
from maxlike.convert import ahead, decoder, mixture, qwen_moe
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import ByHead, Flat, Fused, Shifted, Taps, Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule, mixes_by

F = functools.partial
FULL, LINEAR = "full_attention", "linear_attention"
ATTENTION, DELTA = f"{decoder.LAYER}self_attn.", f"{decoder.LAYER}linear_attn."
MIXER = f"{decoder.OURS}mixer/"
IN_ATTENTION, IN_DELTA = mixes_by("Attention"), mixes_by("GatedDeltaNet")


def _by_key_head(net: Structure) -> ByHead:
    """The kernels cut into as many groups as there are key heads in the layers with a state."""
    layer = _layers(net).index(LINEAR)
    return ByHead(net.shape(f"stack/{layer}/mixer/query/kernel")[1])


def _layers(net: Structure) -> list[str]:
    """The type of each layer. Raises Cannot for one that is neither."""
    types = {"Attention": FULL, "GatedDeltaNet": LINEAR}
    found = [net.value(f"stack/{i}/mixer") for i in range(net.depth())]
    if LINEAR not in [types.get(kind) for kind in found] or not set(found) <= types.keys():
        raise Cannot(f"the network does not mix by {' and '.join(types)}")
    return [types[kind] for kind in found]


def _state() -> tuple[Rule, ...]:
    """Rules of the layers with a recurrent state."""

    def paths(part: str, *names: str) -> tuple[str, ...]:
        return tuple(f"{MIXER}{name}{part}" for name in names)

    kernels = paths("/kernel", "query", "key", "value", "gate"), paths("/kernel", "beta", "decay")
    convolutions = paths("_conv/kernel", "query", "key", "value")
    return (
        Rule(f"{DELTA}in_proj_qkvz.weight", kernels[0], ByHead(), where=IN_DELTA),
        Rule(f"{DELTA}in_proj_ba.weight", kernels[1], _by_key_head),
        Rule(f"{DELTA}conv1d.weight", convolutions, Fused(Taps())),
        Rule(f"{DELTA}dt_bias", f"{MIXER}dt_bias", BIAS),
        Rule(f"{DELTA}A_log", f"{MIXER}A_log", BIAS),
        Rule(f"{DELTA}norm.weight", f"{MIXER}norm/gain", BIAS),
        Rule(f"{DELTA}out_proj.weight", f"{MIXER}out/kernel", Transposed(2), where=IN_DELTA),
    )


def _gated_attention() -> tuple[Rule, ...]:
    """Rules of the other layers. Each head's queries have its gates behind them."""
    gated = {part: (f"{MIXER}query/{part}", f"{MIXER}gate/linear/{part}") for part in ("kernel", "bias")}
    return (
        Rule(f"{ATTENTION}q_proj.weight", gated["kernel"], ByHead(), where=IN_ATTENTION),
        Rule(f"{ATTENTION}q_proj.bias", gated["bias"], ByHead(inputs=0), where=IN_ATTENTION),
        *(
            Rule(f"{ATTENTION}{short}_proj.{kind}", f"{MIXER}{name}/{part}", form, where=IN_ATTENTION)
            for short, name in (("k", "key"), ("v", "value"))
            for kind, part, form in (("weight", "kernel", Transposed()), ("bias", "bias", Flat()))
        ),
        Rule(f"{ATTENTION}o_proj.weight", f"{MIXER}out/kernel", Transposed(2), where=IN_ATTENTION),
        Rule(f"{ATTENTION}o_proj.bias", f"{MIXER}out/bias", BIAS, where=IN_ATTENTION),
        Rule(f"{ATTENTION}q_norm.weight", f"{MIXER}query_norm/gain", Shifted()),
        Rule(f"{ATTENTION}k_norm.weight", f"{MIXER}key_norm/gain", Shifted()),
    )


FULL_LAYER = (
    Rule(f"{decoder.LAYER}input_layernorm.weight", f"{decoder.OURS}mixer_norm/gain", Shifted()),
    Rule(f"{decoder.LAYER}post_attention_layernorm.weight", f"{decoder.OURS}ffn_norm/gain", Shifted()),
    *_gated_attention(),
    *decoder.GATED_MLP,
    *qwen_moe.EXPERTS,
    *qwen_moe.SHARED,
)
FURTHER = "mtp.layers.{i}."
NAMES = {
    "join": "mtp.fc.weight",
    "embed": "mtp.pre_fc_norm_embedding.weight",
    "hidden": "mtp.pre_fc_norm_hidden.weight",
    "final": "mtp.norm.weight",
}


class Qwen3Next(Family):
    """Gated attention (arXiv 2505.06708) in every fourth layer, a gated delta net (arXiv 2412.06464) in the others,
    many experts of which one all tokens pass. Its norms are zero-centred, x (1 + w), but the one of the delta net.

    The module that predicts a second token (mtp.) is a layer with attention; a network without it (LanguageModel.mtp)
    leaves it behind.
    """

    architectures = ("Qwen3NextForCausalLM",)
    model_type = "qwen3_next"
    defaults: ClassVar = {
        "head_dim": 256, "num_key_value_heads": 2, "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
    }  # fmt: skip
    tensors = (
        Rule("model.embed_tokens.weight", "embed/table", TABLE),
        Rule("lm_head.weight", "head/linear/kernel"),
        Rule("model.norm.weight", "norm/gain", Shifted()),
        *FULL_LAYER,
        *_state(),
        *ahead.rules(FULL_LAYER, FURTHER, NAMES, Shifted()),
    )

    def unused(self, net: Structure) -> tuple[str, ...]:
        return self.ignored if ahead.count(net) else (*self.ignored, r"mtp\..*")

    def block(self, config: ConfigJson) -> Callable[[qwen_moe.Kind], Callable]:
        """From the kind of a layer to its block."""
        norm, bias = decoder.rms_norm(config), config.take("attention_bias", False)
        attention = decoder.attention(
            config, rope=decoder.rope(config, fraction=0.25), qkv_bias=bias, out_bias=bias, qk_norm=norm
        )
        mixers = {
            FULL: F(attention, gate=F(AttentionGate, bias=bias)),
            LINEAR: F(
                GatedDeltaNet,
                heads=config.size("linear_num_value_heads", 32),
                key_heads=config.size("linear_num_key_heads", 16),
                key_dim=config.size("linear_key_head_dim", 128),
                value_dim=config.size("linear_value_head_dim", 128),
                conv_width=config.size("linear_conv_kernel_dim", 4),
                norm=F(GatedRMSNorm, norm_before_gate=True, eps=config.take("rms_norm_eps", 1e-6)),
            ),
        }
        layers = qwen_moe.kinds(config, _types(config))
        ffn = qwen_moe.feed_forward(config, shared_width=config.size("shared_expert_intermediate_size"))(layers)
        return lambda kind: F(Block, mixer=mixers[kind.mixer], ffn=ffn(kind), norm=norm)

    def network(self, config: ConfigJson) -> Callable:
        config.ignore(ahead.DEPTH)
        layers = qwen_moe.kinds(config, _types(config))
        return decoder.language_model(config, layers, decoder.rms_norm(config), block=self.block(config))

    def ahead(self, config: ConfigJson) -> Callable:
        config.expect(ahead.DEPTH, 1)
        return ahead.modules(self.block(config)(qwen_moe.Kind(FULL, True)), decoder.rms_norm(config))

    def config(self, net: Structure) -> dict[str, Any]:
        types = _layers(net)
        if FULL not in types:
            raise Cannot("the network has no layer with attention")
        full, linear = (f"stack/{types.index(kind)}/mixer" for kind in (FULL, LINEAR))
        _, key_heads, key_dim = net.shape(f"{linear}/query/kernel")
        _, value_heads, value_dim = net.shape(f"{linear}/value/kernel")
        layer = mixture.sparse(net).index(True)
        return qwen_moe.experts_config(net, full) | {
            "layer_types": types,
            "partial_rotary_factor": net.value(f"{full}/rope").fraction,
            "attention_bias": net.has(f"{full}/query/bias"),
            "shared_expert_intermediate_size": net.shape(f"stack/{layer}/ffn/shared/gate/kernel")[1],
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": key_dim,
            "linear_value_head_dim": value_dim,
            "linear_conv_kernel_dim": net.shape(f"{linear}/query_conv/kernel")[0],
        }


def _types(config: ConfigJson) -> list[str]:
    depth, every = config.size("num_hidden_layers"), config.size("full_attention_interval", 4)
    types = config.take("layer_types", None) or [LINEAR if (i + 1) % every else FULL for i in range(depth)]
    if not isinstance(types, list) or len(types) != depth or any(kind not in (FULL, LINEAR) for kind in types):
        raise Cannot(f"layer_types = {str(types)[:80]} must name {FULL} or {LINEAR} for each of {depth} layers")
    return types
