"""DeepSeek-V2 and V3."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from layers.balance import LoadBalance, SignBias
from layers.block import Block
from layers.mla import MLA
from layers.norm import RMSNorm
from layers.rope import YaRN
from layers.routers import GroupLimit, TopK
from maxlike.convert import ahead, decoder, mixture
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import ByHead, Fused, Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, Rule

F = functools.partial


def latent_attention(theirs: str = "self_attn", ours: str = "mixer") -> tuple[Rule, ...]:
    """Rules of a latent attention; its latent and the shared key are one matrix there, and so are the keys and values
    of each head."""
    name, theirs, ours = ours, f"{decoder.LAYER}{theirs}.", f"{decoder.OURS}{ours}/"

    def ranked(net: Structure, layer: str) -> bool:
        return net.has(f"{layer}/{name}/query_down/kernel")

    return (
        Rule(f"{theirs}q_b_proj.weight", f"{ours}query/kernel", where=ranked),
        Rule(f"{theirs}q_proj.weight", f"{ours}query/kernel", where=lambda net, layer: not ranked(net, layer)),
        Rule(f"{theirs}q_a_proj.weight", f"{ours}query_down/kernel"),
        Rule(f"{theirs}q_a_layernorm.weight", f"{ours}query_norm/gain", BIAS),
        Rule(f"{theirs}kv_a_proj_with_mqa.weight", (f"{ours}latent/kernel", f"{ours}shared_key/kernel"), SIDE_BY_SIDE),
        Rule(f"{theirs}kv_a_layernorm.weight", f"{ours}latent_norm/gain", BIAS),
        Rule(f"{theirs}kv_b_proj.weight", (f"{ours}key/kernel", f"{ours}value/kernel"), ByHead()),
        Rule(f"{theirs}o_proj.weight", f"{ours}out/kernel", Transposed(2)),
    )


SIDE_BY_SIDE = Fused(Transposed())
LATENT_NORM = F(RMSNorm, eps=1e-6)  # whatever rms_norm_eps says


class _DeepSeek(Family):
    """Latent attention, dense layers first, then experts of which some all tokens pass."""

    tensors = (
        *decoder.EMBEDDINGS,
        *latent_attention(),
        *decoder.PRE_NORMS,
        *decoder.GATED_MLP,
        mixture.router("mlp.gate"),
        *mixture.experts("mlp"),
        *mixture.shared("mlp.shared_experts"),
    )

    def router(self, config: ConfigJson, top_k: int) -> Callable:
        raise ValueError(f"{type(self).__name__} does not say how it routes")

    def network(self, config: ConfigJson) -> Callable:
        config.expect("moe_layer_freq", 1)
        config.expect("mlp_bias", False)
        config.ignore("head_dim", "qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers")
        dense, depth = config.take("first_k_dense_replace", 0), config.size("num_hidden_layers")
        norm, sparse, mlp = decoder.rms_norm(config), self.sparse(config), self.dense(config)
        return decoder.language_model(config, [sparse if i >= dense else mlp for i in range(depth)], norm)

    def dense(self, config: ConfigJson) -> Callable:
        """The block of a layer without experts."""
        return F(Block, mixer=attention(config), ffn=decoder.gated_mlp(config), norm=decoder.rms_norm(config))

    def sparse(self, config: ConfigJson) -> Callable:
        """The block of a layer with experts."""
        top_k = config.size("num_experts_per_tok")
        width = config.size("moe_intermediate_size")
        experts = mixture.moe(
            config,
            self.router(config, top_k),
            count=config.size("n_routed_experts"),
            width=width,
            shared_width=width * config.size("n_shared_experts"),
            losses=_losses(config),
        )
        return F(Block, mixer=attention(config), ffn=experts, norm=decoder.rms_norm(config))

    def config(self, net: Structure) -> dict[str, Any]:
        sparse = mixture.sparse(net)
        first = sparse.index(True)
        count, _, width = net.shape(f"stack/{first}/ffn/experts/gate")
        shared = net.shape(f"stack/{first}/ffn/shared/gate/kernel")[1]
        if shared % width:
            raise Cannot(f"the shared width {shared} is no multiple of an expert's, {width}")
        router = f"stack/{first}/ffn/router"
        limited = f"{router}/limit.groups" in net.settings
        return attention_config(net) | {
            "num_hidden_layers": net.depth(),
            "first_k_dense_replace": first,
            "intermediate_size": net.shape("stack/0/ffn/gate/kernel")[1] if first else shared,
            "hidden_act": decoder.activation_config(net, f"stack/{first}/ffn/experts/activation"),
            "rms_norm_eps": net.value("norm/eps"),
            "n_routed_experts": count,
            "n_shared_experts": shared // width,
            "moe_intermediate_size": width,
            "num_experts_per_tok": net.value(f"{router}/top_k"),
            "norm_topk_prob": net.value(f"{router}/norm_topk"),
            "routed_scaling_factor": net.value(f"{router}/scale"),
            "n_group": net.value(f"{router}/limit.groups") if limited else 1,
            "topk_group": net.value(f"{router}/limit.top_groups") if limited else 1,
        }


class DeepseekV2(_DeepSeek):
    """DeepSeek-V2 (arXiv 2405.04434) and V2-Lite, which has no query rank: softmax scores, experts from the groups
    whose best expert is best."""

    architectures = ("DeepseekV2ForCausalLM",)
    model_type = "deepseek_v2"
    defaults: ClassVar = {"q_lora_rank": 1536}

    def router(self, config: ConfigJson, top_k: int) -> Callable:
        config.expect("norm_topk_prob", False)
        config.expect("scoring_func", "softmax")
        limited = config.choose("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
        limit = _limit(config, best=1)
        scale = float(config.take("routed_scaling_factor", 1.0))
        return F(TopK, top_k=top_k, norm_topk=False, scale=scale, limit=limit if limited else None)

    def config(self, net: Structure) -> dict[str, Any]:
        keys = super().config(net)
        return keys | {"topk_method": "greedy" if keys["n_group"] == 1 else "group_limited_greedy"}


SELECTION = Rule(f"{decoder.LAYER}mlp.gate.e_score_correction_bias", f"{decoder.OURS}ffn/router/bias", BIAS)
FURTHER = "model.layers.{ahead}."


class DeepseekV3(_DeepSeek):
    """DeepSeek-V3 (arXiv 2412.19437): sigmoid scores, a selection bias that balances, groups by their two best.

    The modules that predict further ahead are the layers behind the last, with experts; they hold embedding and head a
    second time. A network without them (LanguageModel.mtp) leaves them behind.
    """

    architectures = ("DeepseekV3ForCausalLM",)
    model_type = "deepseek_v3"
    defaults: ClassVar = {"first_k_dense_replace": 3, "n_group": 8, "q_lora_rank": 1536, "topk_group": 4}
    tensors = (
        *_DeepSeek.tensors,
        SELECTION,
        *ahead.rules(
            (*_DeepSeek.tensors, SELECTION),
            FURTHER,
            {
                "join": f"{FURTHER}eh_proj.weight",
                "embed": f"{FURTHER}enorm.weight",
                "hidden": f"{FURTHER}hnorm.weight",
                "final": f"{FURTHER}shared_head.norm.weight",
            },
        ),
    )

    def copies(self, net: Structure) -> dict[str, str]:
        head = "lm_head.weight" if net.has("head/linear/kernel") else "model.embed_tokens.weight"
        found = {}
        for i in range(net.depth(), net.depth() + ahead.count(net)):
            found[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
            found[f"model.layers.{i}.shared_head.head.weight"] = head
        return found

    def unused(self, net: Structure) -> tuple[str, ...]:
        return self.ignored if ahead.count(net) else (*self.ignored, rf"model\.layers\.{net.depth()}\..*")

    def ahead(self, config: ConfigJson) -> Callable:
        return ahead.modules(self.sparse(config), decoder.rms_norm(config), config.size(ahead.DEPTH, 1))

    def router(self, config: ConfigJson, top_k: int) -> Callable:
        config.expect("scoring_func", "sigmoid")
        config.expect("topk_method", "noaux_tc")
        normed, scale = config.take("norm_topk_prob", True), float(config.take("routed_scaling_factor", 2.5))
        limit = _limit(config, best=2)
        return F(TopK, top_k=top_k, score="sigmoid", norm_topk=normed, scale=scale, limit=limit, bias=SignBias)

    def config(self, net: Structure) -> dict[str, Any]:
        keys = super().config(net)
        return keys | {"rope_interleave": net.value("stack/0/mixer/rope").layout == "interleaved"}


def attention(config: ConfigJson, **knobs: Any) -> Callable:
    """Latent attention with the usual keys; knobs: further ones of MLA."""
    heads = config.size("num_attention_heads")
    config.expect("num_key_value_heads", heads)
    config.expect("attention_bias", False)
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    layout = "interleaved" if config.take("rope_interleave", True) else "half"
    rank = config.take("q_lora_rank", None)
    return F(
        MLA,
        heads=heads,
        kv_rank=config.size("kv_lora_rank"),
        query_rank=None if rank is None else config.size("q_lora_rank"),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=config.size("v_head_dim"),
        rope=decoder.rope(config, layout=layout),
        latent_norm=LATENT_NORM,
        scale=(nope + rope) ** -0.5 * _growth(config) ** 2,
        **knobs,
    )


def _growth(config: ConfigJson) -> float:
    """The factor on queries and on keys that YaRN adds: mscale of `mscale_all_dim`."""
    given = config.within("rope_parameters") or config.within("rope_scaling")
    if given is None or not given.take("mscale_all_dim", None):
        return 1.0
    return decoder.yarn_mscale(float(given.take("factor")), given.take("mscale_all_dim"))


def attention_config(net: Structure) -> dict[str, Any]:
    """The keys that `attention` reads, and those of vocabulary and embedding."""
    mixer = "stack/0/mixer"
    dim = net.shape(f"{mixer}/latent/kernel")[0]
    heads, value_dim, _ = net.shape(f"{mixer}/out/kernel")
    ranked = net.has(f"{mixer}/query_down/kernel")
    return {
        "vocab_size": net.value("vocab"),
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": net.shape(f"{mixer}/query_down/kernel")[1] if ranked else None,
        "kv_lora_rank": net.value(f"{mixer}/kv_rank"),
        "qk_nope_head_dim": net.value(f"{mixer}/nope_dim"),
        "qk_rope_head_dim": net.value(f"{mixer}/rope_dim"),
        "v_head_dim": value_dim,
        "tie_word_embeddings": not net.has("head/linear/kernel"),
        **_rope_config(net, mixer),
    }


def _rope_config(net: Structure, mixer: str) -> dict[str, Any]:
    """With the growth of the softmax scale told as `mscale` and `mscale_all_dim`, which older readers know too."""
    rope = net.value(f"{mixer}/rope")
    keys = decoder.rope_config(rope)
    growth = math.sqrt(net.value(f"{mixer}/scale") * math.sqrt(net.value(f"{mixer}/nope_dim") + rope.head_dim))
    if not isinstance(rope.scaling, YaRN) or math.isclose(growth, 1.0) or rope.scaling.factor == 1.0:
        return keys
    one = decoder.yarn_mscale(rope.scaling.factor, 1.0) - 1.0
    turned = decoder.yarn_mscale(rope.scaling.factor, 1.0)
    if rope.scaling.attention_factor is not None:
        turned = rope.scaling.attention_factor
    scaling = keys["rope_scaling"] | {
        "mscale": round((turned * growth - 1.0) / one, 12),
        "mscale_all_dim": round((growth - 1.0) / one, 12),
        "attention_factor": turned,
    }
    return keys | {"rope_scaling": scaling}


def _limit(config: ConfigJson, *, best: int) -> Callable | None:
    groups, kept = config.take("n_group", None) or 1, config.take("topk_group", None) or 1
    return None if groups == kept else F(GroupLimit, groups=groups, top_groups=kept, best=best)


def _losses(config: ConfigJson) -> tuple[Callable, ...]:
    """For a training that goes on; the coefficient is that of a loss with minimum 1, a layer."""
    coefficient = float(config.take("aux_loss_alpha", 0.0))
    scope = "sequence" if config.take("seq_aux", True) else "batch"
    return (F(LoadBalance, coefficient=coefficient, scope=scope),) if coefficient > 0 else ()
