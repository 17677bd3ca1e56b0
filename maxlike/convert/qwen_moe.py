"""Qwen1.5-MoE, Qwen2-MoE and Qwen3-MoE."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from layers.block import Block
from layers.norm import RMSNorm
from layers.routers import TopK
from maxlike.convert import decoder, mixture, qwen
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.structure import Structure
from maxlike.convert.tensors import Rule

F = functools.partial
BASE = (*decoder.EMBEDDINGS, *decoder.ATTENTION, *decoder.PRE_NORMS, *decoder.GATED_MLP)
EXPERTS = (mixture.router("mlp.gate"), *mixture.experts("mlp"))
SHARED = (
    *mixture.shared("mlp.shared_expert"),
    Rule(f"{decoder.LAYER}mlp.shared_expert_gate.weight", f"{decoder.OURS}ffn/shared_gate"),
)


class Qwen2Moe(Family):
    """Qwen2 with many narrow experts and a gated one that all tokens pass (arXiv 2407.10671)."""

    architectures = ("Qwen2MoeForCausalLM",)
    model_type = "qwen2_moe"
    defaults: ClassVar = {"router_aux_loss_coef": 0.001}
    tensors = (*BASE, *EXPERTS, *SHARED)

    def network(self, config: ConfigJson) -> Callable:
        bias = config.take("qkv_bias", True)
        if config.take("layer_types", None) is None:
            config.expect("use_sliding_window", False)  # which layers had windows has meant different things
        attention = F(decoder.attention, config, rope=decoder.rope(config), qkv_bias=bias)
        ffn = feed_forward(config, shared_width=config.size("shared_expert_intermediate_size"))
        return network(config, qwen.windows(config), attention, ffn)

    def config(self, net: Structure) -> dict[str, Any]:
        layer = mixture.sparse(net).index(True)
        return (
            experts_config(net)
            | qwen.windows_config(net)
            | {
                "qkv_bias": net.has("stack/0/mixer/query/bias"),
                "shared_expert_intermediate_size": net.shape(f"stack/{layer}/ffn/shared/gate/kernel")[1],
            }
        )


class Qwen3Moe(Family):
    """Qwen3 with experts alone (arXiv 2505.09388); a window is for all layers or none."""

    architectures = ("Qwen3MoeForCausalLM",)
    model_type = "qwen3_moe"
    defaults: ClassVar = {"num_key_value_heads": 4, "router_aux_loss_coef": 0.001}
    tensors = (*BASE, *EXPERTS)

    def network(self, config: ConfigJson) -> Callable:
        bias, window = config.take("attention_bias", False), config.take("sliding_window", None)
        used = config.take("use_sliding_window", False)
        config.ignore("max_window_layers")
        qk_norm = F(RMSNorm, eps=config.take("rms_norm_eps", 1e-6))
        attention = F(
            decoder.attention, config, rope=decoder.rope(config), qkv_bias=bias, out_bias=bias, qk_norm=qk_norm
        )
        windows = [window if used else None] * config.size("num_hidden_layers")
        return network(config, windows, attention, feed_forward(config))

    def config(self, net: Structure) -> dict[str, Any]:
        window = net.value("stack/0/mixer/window")
        return experts_config(net) | {
            "attention_bias": net.has("stack/0/mixer/query/bias"),
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }


class Kind(NamedTuple):
    """What layers differ in: the mixer's window (or kind), and whether there are experts."""

    mixer: Any
    sparse: bool


def kinds(config: ConfigJson, mixers: list[Any]) -> list[Kind]:
    """Each layer's, from `decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = config.size("decoder_sparse_step", 1), config.take("mlp_only_layers", None) or []
    return [Kind(mixer, i not in dense and (i + 1) % step == 0) for i, mixer in enumerate(mixers)]


def feed_forward(config: ConfigJson, shared_width: int | None = None) -> Callable[[list[Kind]], Callable]:
    """From the layers' kinds to the function from a kind to its feed-forward."""
    top_k, count = config.size("num_experts_per_tok"), config.take("num_local_experts", None)
    router = F(TopK, top_k=top_k, norm_topk=config.take("norm_topk_prob", False))
    count = config.size("num_experts") if count is None else config.size("num_local_experts")
    config.ignore("num_experts", "intermediate_size")

    def of(kinds: list[Kind]) -> Callable:
        layers = sum(kind.sparse for kind in kinds)
        sparse = mixture.moe(
            config,
            router,
            count=count,
            width=config.size("moe_intermediate_size"),
            shared_width=shared_width,
            shared_gate=shared_width is not None,
            losses=mixture.balance(config, top_k=top_k, layers=layers),
        )
        dense = decoder.gated_mlp(config) if layers < len(kinds) else None
        return lambda kind: sparse if kind.sparse else dense

    return of


def network(config: ConfigJson, mixers: list[Any], attention: Callable, ffn: Callable) -> Callable:
    """The network; `attention(window=...)` is the mixer's factory, ffn what `feed_forward` gives."""
    norm, layers = decoder.rms_norm(config), kinds(config, mixers)
    ffn = ffn(layers)

    def block(kind: Kind) -> Callable:
        return F(Block, mixer=attention(window=kind.mixer), ffn=ffn(kind), norm=norm)

    return decoder.language_model(config, layers, norm, block=block)


def experts_config(net: Structure, mixer: str = "stack/0/mixer") -> dict[str, Any]:
    """The keys that `kinds` and `feed_forward` read, and the decoder's; mixer: path of an attention."""
    sparse = mixture.sparse(net)
    layer, dense = sparse.index(True), [i for i, found in enumerate(sparse) if not found]
    count, _, width = net.shape(f"stack/{layer}/ffn/experts/gate")
    return mixture.sizes_config(net, layer, mixer) | {
        "num_experts": count,
        "moe_intermediate_size": width,
        "intermediate_size": net.shape(f"stack/{dense[0]}/ffn/gate/kernel")[1] if dense else width,
        "norm_topk_prob": net.value(f"stack/{layer}/ffn/router/norm_topk"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
