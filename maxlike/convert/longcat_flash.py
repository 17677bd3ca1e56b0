"""LongCat-Flash."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.balance import BudgetBias
from layers.block import Block
from layers.norm import RMSNorm
from layers.routers import TopK
from layers.shortcut_block import ShortcutBlock
from layers.zero_experts import ZeroExperts
from maxlike.convert import ahead, decoder, deepseek, mixture
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, Rule

F = functools.partial
HALVES = ("", "second_")
FURTHER = "model.mtp.layers.{i}."
DENSE = tuple(
    Rule(f"{decoder.LAYER}transformer_layer.mlp.{part}_proj.weight", f"{decoder.OURS}ffn/{part}/kernel")
    for part in ("gate", "up", "down")
)


class LongcatFlash(Family):
    """Two latent attentions and two dense feed-forwards a layer with a mixture of experts beside them, of which some
    compute nothing (arXiv 2509.01322).

    The module that predicts a second token (model.mtp.) is a dense layer with one attention, and holds the embedding a
    second time; a network without it (LanguageModel.mtp) leaves it behind. What config.json does not say, how many
    experts with weights a token is meant to visit, is taken to be their share of all.
    """

    architectures = ("LongcatFlashForCausalLM",)
    model_type = "longcat_flash"
    defaults: ClassVar = {"rope_theta": 1e7, "zero_expert_num": 256}
    tensors = (
        *decoder.EMBEDDINGS,
        *(
            rule
            for i, half in enumerate(HALVES)
            for rule in (
                *deepseek.latent_attention(f"self_attn.{i}", f"{half}mixer"),
                *(
                    Rule(f"{decoder.LAYER}mlps.{i}.{part}_proj.weight", f"{decoder.OURS}{half}ffn/{part}/kernel")
                    for part in ("gate", "up", "down")
                ),
                Rule(f"{decoder.LAYER}input_layernorm.{i}.weight", f"{decoder.OURS}{half}mixer_norm/gain", BIAS),
                Rule(f"{decoder.LAYER}post_attention_layernorm.{i}.weight", f"{decoder.OURS}{half}ffn_norm/gain", BIAS),
            )
        ),
        mixture.router("mlp.router.classifier", "moe"),
        Rule(f"{decoder.LAYER}mlp.router.e_score_correction_bias", f"{decoder.OURS}moe/router/bias", BIAS),
        *mixture.experts("mlp", "moe"),
        *ahead.rules(
            (*deepseek.latent_attention(), *decoder.PRE_NORMS, *DENSE),
            FURTHER,
            {
                "join": f"{FURTHER}eh_proj.weight",
                "embed": f"{FURTHER}enorm.m.weight",
                "hidden": f"{FURTHER}hnorm.m.weight",
                "final": "model.mtp.norm.weight",
            },
        ),
    )

    def copies(self, net: Structure) -> dict[str, str]:
        return {"model.mtp.embed_tokens.weight": "model.embed_tokens.weight"} if ahead.count(net) else {}

    def unused(self, net: Structure) -> tuple[str, ...]:
        """And the rows that `transformers` allocates for experts that compute nothing."""
        first, _, _ = net.shape("stack/0/moe/experts/gate")
        zero = range(first, net.shape("stack/0/moe/router/kernel")[1])
        numbers = "|".join(map(str, zero))
        ignored = self.ignored if ahead.count(net) else (*self.ignored, r"model\.mtp\..*")
        return (*ignored, rf"model\.layers\.\d+\.mlp\.experts\.({numbers})\..*") if zero else ignored

    def ahead(self, config: ConfigJson) -> Callable:
        config.expect(ahead.DEPTH, 1)
        mixer, norm = deepseek.attention(config, scale_correction=True), _norm(config)
        ffn = decoder.gated_mlp(config, width="ffn_hidden_size")
        return ahead.modules(F(Block, mixer=mixer, ffn=ffn, norm=norm), norm)

    def network(self, config: ConfigJson) -> Callable:
        config.expect("attention_method", "MLA")
        config.expect("mla_scale_q_lora", True)
        config.expect("mla_scale_kv_lora", True)
        config.expect("zero_expert_type", "identity")
        config.expect("router_bias", False)
        config.expect("norm_topk_prob", False)
        config.ignore("head_dim", "qk_head_dim", "num_hidden_layers", "num_nextn_predict_layers")
        count, zero = config.size("n_routed_experts"), config.take("zero_expert_num", 0)
        top_k = config.size("moe_topk")
        router = F(
            TopK,
            top_k=top_k,
            scale=float(config.take("routed_scaling_factor", 6.0)),
            bias=F(BudgetBias, target=top_k * count / (count + zero)),
        )
        moe = mixture.moe(
            config,
            router,
            count=count,
            width=config.size("expert_ffn_hidden_size"),
            zero_experts=F(ZeroExperts, identity=zero) if zero else None,
        )
        config.size("q_lora_rank")
        norm = _norm(config)
        block = F(
            ShortcutBlock,
            mixer=deepseek.attention(config, scale_correction=True),
            ffn=decoder.gated_mlp(config, width="ffn_hidden_size"),
            moe=moe,
            norm=norm,
        )
        return decoder.language_model(config, [block] * config.size("num_layers"), norm)

    def config(self, net: Structure) -> dict[str, Any]:
        count, _, width = net.shape("stack/0/moe/experts/gate")
        zero = "stack/0/moe/zero_experts/count"
        keys = deepseek.attention_config(net)
        if keys["q_lora_rank"] is None:
            raise Cannot("the queries have no rank of their own")
        return keys | {
            "head_dim": keys["qk_rope_head_dim"],  # of which `transformers` makes the rotary embedding
            "num_layers": net.depth(),
            "ffn_hidden_size": net.shape("stack/0/ffn/gate/kernel")[1],
            "hidden_act": decoder.activation_config(net),
            "rms_norm_eps": net.value("norm/eps"),
            "n_routed_experts": count,
            "zero_expert_num": net.value(zero) if zero in net.settings else 0,
            "zero_expert_type": "identity",
            "expert_ffn_hidden_size": width,
            "moe_topk": net.value("stack/0/moe/router/top_k"),
            "routed_scaling_factor": net.value("stack/0/moe/router/scale"),
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "router_bias": False,
        }


def _norm(config: ConfigJson) -> Callable:
    return F(RMSNorm, eps=config.take("rms_norm_eps", 1e-5))
