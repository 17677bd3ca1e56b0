"""Mixtral."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from layers.norm import RMSNorm
from layers.routers import TopK
from maxlike.convert import decoder, mixture
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.structure import Structure


class Mixtral(Family):
    """Mistral with a mixture of experts in every layer, weights normed over the chosen ones (arXiv 2401.04088)."""

    architectures = ("MixtralForCausalLM",)
    model_type = "mixtral"
    defaults: ClassVar = {"num_key_value_heads": 8, "rope_theta": 1e6, "router_aux_loss_coef": 0.001}
    tensors = (
        *decoder.EMBEDDINGS,
        *decoder.ATTENTION,
        *decoder.PRE_NORMS,
        mixture.router("block_sparse_moe.gate"),
        *mixture.experts("block_sparse_moe", names=("w1", "w3", "w2")),
    )

    def network(self, config: ConfigJson) -> Callable:
        window, depth = config.take("sliding_window", None), config.size("num_hidden_layers")
        mixer = decoder.attention(config, rope=decoder.rope(config), window=window)
        top_k = config.size("num_experts_per_tok", 2)
        ffn = mixture.moe(
            config,
            functools.partial(TopK, top_k=top_k, norm_topk=True),
            count=config.size("num_local_experts", 8),
            width=config.size("intermediate_size"),
            losses=mixture.balance(config, top_k=top_k, layers=depth),
        )
        norm = functools.partial(RMSNorm, eps=config.take("rms_norm_eps", 1e-5))
        block = functools.partial(Block, mixer=mixer, ffn=ffn, norm=norm)
        return decoder.language_model(config, [block] * depth, norm)

    def config(self, net: Structure) -> dict[str, Any]:
        count, _, width = net.shape("stack/0/ffn/experts/gate")
        return mixture.sizes_config(net, 0) | {
            "num_local_experts": count,
            "intermediate_size": width,
            "sliding_window": net.value("stack/0/mixer/window"),
        }
