"""Qwen2, Qwen2.5 and Qwen3, dense."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from layers.norm import RMSNorm
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.llama import Llama
from maxlike.convert.structure import Cannot, Structure

FULL, SLIDING = "full_attention", "sliding_attention"


class Qwen2(Family):
    """Llama with biases on queries, keys and values alone (arXiv 2407.10671, 2412.15115)."""

    architectures = ("Qwen2ForCausalLM",)
    model_type = "qwen2"
    tensors = Llama.tensors

    def network(self, config: ConfigJson) -> Callable:
        attention = functools.partial(decoder.attention, config, rope=decoder.rope(config), qkv_bias=True)
        return network(config, attention)

    def config(self, net: Structure) -> dict[str, Any]:
        return decoder.config(net) | windows_config(net)


class Qwen3(Family):
    """Llama with an RMSNorm on each query and key head (arXiv 2505.09388); its width does not decide head_dim."""

    architectures = ("Qwen3ForCausalLM",)
    model_type = "qwen3"
    defaults: ClassVar = {"head_dim": 128}
    tensors = Llama.tensors

    def network(self, config: ConfigJson) -> Callable:
        bias = config.take("attention_bias", False)
        qk_norm = functools.partial(RMSNorm, eps=config.take("rms_norm_eps", 1e-6))
        attention = functools.partial(
            decoder.attention, config, rope=decoder.rope(config), qkv_bias=bias, out_bias=bias, qk_norm=qk_norm
        )
        return network(config, attention)

    def config(self, net: Structure) -> dict[str, Any]:
        bias = {"attention_bias": net.has("stack/0/mixer/query/bias")}
        return decoder.config(net) | windows_config(net) | bias


def network(config: ConfigJson, attention: Callable) -> Callable:
    """The network whose layers differ in their window alone; `attention(window=...)` is the mixer's factory."""
    ffn, norm = decoder.gated_mlp(config), decoder.rms_norm(config)

    def block(window: int | None) -> Callable:
        return functools.partial(Block, mixer=attention(window=window), ffn=ffn, norm=norm)

    return decoder.language_model(config, windows(config), norm, block=block)


def windows(config: ConfigJson) -> list[int | None]:
    """The window of each layer: `layer_types` says which have one, else those from `max_window_layers` on."""
    config.expect("use_mrope", False)
    depth, window = config.size("num_hidden_layers"), config.take("sliding_window", None)
    used, first = config.take("use_sliding_window", False), config.take("max_window_layers", 28)
    types = config.take("layer_types", None)
    if types is None:
        types = [SLIDING if used and window is not None and i >= first else FULL for i in range(depth)]
    if not isinstance(types, list) or len(types) != depth or any(kind not in (FULL, SLIDING) for kind in types):
        raise Cannot(f"layer_types = {str(types)[:80]} must name {FULL} or {SLIDING} for each of {depth} layers")
    if SLIDING in types and not (used and window is not None):
        raise Cannot(f"layer_types names {SLIDING} and sliding_window is off: bring back a good config.json")
    return [window if kind == SLIDING else None for kind in types]


def windows_config(net: Structure) -> dict[str, Any]:
    """The keys that `windows` reads."""
    found = [net.value(f"stack/{i}/mixer/window") for i in range(net.depth())]
    sizes = {window for window in found if window is not None}
    if not sizes:
        return {"use_sliding_window": False}
    full = [window is None for window in found]
    return {
        "use_sliding_window": True,
        "sliding_window": min(sizes),
        "max_window_layers": full.index(False),
        "layer_types": [FULL if whole else SLIDING for whole in full],
    }
