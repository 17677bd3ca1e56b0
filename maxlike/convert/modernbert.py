"""ModernBERT, and the encoders and decoders of Ettin."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from layers.attention import Attention
from layers.block import Block
from layers.embed import Embed, PredictionHead
from layers.mlp import GatedMLP
from layers.norm import Identity, LayerNorm
from layers.rope import RoPE
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Flat, Fused, Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule

F = functools.partial
OURS = decoder.OURS
FULL, SLIDING = "full_attention", "sliding_attention"
APART = {
    f"{decoder.LAYER}attn.{short}_proj": ((f"{OURS}mixer/{name}",), Transposed())
    for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
}
TOGETHER = {f"{decoder.LAYER}attn.Wqkv": (tuple(f"{OURS}mixer/{x}" for x in ("query", "key", "value")), Transposed())}


def _rules(projections: dict[str, tuple[tuple[str, ...], Transposed]], head: str) -> tuple[Rule, ...]:
    """The table with those projections to heads, and that name of the head for masked tokens."""
    linears = projections | {
        f"{decoder.LAYER}attn.Wo": ((f"{OURS}mixer/out",), Transposed(2)),
        f"{decoder.LAYER}mlp.Wi": ((f"{OURS}ffn/gate", f"{OURS}ffn/up"), Transposed()),
        f"{decoder.LAYER}mlp.Wo": ((f"{OURS}ffn/down",), Transposed()),
        f"{head}.dense": (("head/dense",), Transposed()),
    }
    norms = {
        "model.embeddings.norm": "embed/norm",
        f"{decoder.LAYER}attn_norm": f"{OURS}mixer_norm",
        f"{decoder.LAYER}mlp_norm": f"{OURS}ffn_norm",
        "model.final_norm": "norm",
        f"{head}.norm": "head/norm",
    }
    return (
        Rule("model.embeddings.tok_embeddings.weight", "embed/table", TABLE),
        Rule("decoder.weight", "head/head/linear/kernel"),
        Rule("decoder.bias", "head/head/bias", BIAS),
        *(
            Rule(f"{name}.{kind}", tuple(f"{path}/{part}" for path in paths), Fused(form))
            for name, (paths, kernel) in linears.items()
            for kind, part, form in (("weight", "kernel", kernel), ("bias", "bias", Flat()))
        ),
        *(
            Rule(f"{name}.{kind}", f"{path}/{part}", BIAS)
            for name, path in norms.items()
            for kind, part in (("weight", "gain"), ("bias", "bias"))
        ),
    )


class Kind(NamedTuple):
    """What layers differ in: whether they see all or a window, and that the first has no norm before its mixer."""

    window: int | None
    first: bool


class ModernBert(Family):
    """ModernBERT (arXiv 2412.13663; Ettin: 2507.11412) with its head for masked tokens: local attention with a global
    layer now and then, GeGLU, a norm behind the embedding."""

    architectures = ("ModernBertForMaskedLM",)
    model_type = "modernbert"
    tied: ClassVar = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
    tensors = _rules(TOGETHER, "head")
    causal: ClassVar[bool] = False

    def network(self, config: ConfigJson) -> Callable:
        config.ignore("initializer_cutoff_factor", "classifier_pooling", "classifier_dropout", "mlp_dropout")
        config.ignore("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index", "layer_norm_eps")
        config.ignore("reference_compile", "repad_logits_with_grad", "position_embedding_type", "tie_word_embeddings")
        config.ignore("gradient_checkpointing")
        config.expect("causal_mask", self.causal)
        heads, norm = config.size("num_attention_heads"), _norm(config)
        bias, ropes = config.take("attention_bias", False), _ropes(config)
        attention = F(Attention, heads=heads, causal=self.causal, qkv_bias=bias, out_bias=bias)
        ffn = F(
            GatedMLP,
            width=config.size("intermediate_size"),
            activation=config.choose("hidden_activation", decoder.ACTIVATIONS, "gelu"),
            bias=config.take("mlp_bias", False),
        )

        def block(kind: Kind) -> Callable:
            mixer = F(attention, window=kind.window, rope=ropes[FULL if kind.window is None else SLIDING])
            return F(Block, mixer=mixer, ffn=ffn, norm=norm, mixer_norm=Identity if kind.first else None)

        activation = config.choose("classifier_activation", decoder.ACTIVATIONS, "gelu")
        dense_bias, token_bias = config.take("classifier_bias", False), config.take("decoder_bias", True)

        def head(plain: Callable) -> Callable:
            return F(PredictionHead, norm=norm, activation=activation, bias=dense_bias, head=F(plain, bias=token_bias))

        return decoder.language_model(
            config, self._kinds(config), norm, block=block, tied=True, embed=F(Embed, norm=norm), head=head
        )

    def config(self, net: Structure) -> dict[str, Any]:
        if net.value("stack/0/mixer/causal") != self.causal:
            raise Cannot(f"the network is {'not ' if self.causal else ''}causal, other than {self.model_type}")
        dim, heads, _ = net.shape("stack/0/mixer/query/kernel")
        windows = [net.value(f"stack/{i}/mixer/window") for i in range(net.depth())]
        local = {window for window in windows if window is not None}
        return {
            "vocab_size": net.value("vocab"),
            "hidden_size": dim,
            "num_hidden_layers": net.depth(),
            "num_attention_heads": heads,
            "intermediate_size": net.shape("stack/0/ffn/gate/kernel")[1],
            "hidden_activation": decoder.activation_config(net),
            "norm_eps": net.value("norm/eps"),
            "norm_bias": net.has("norm/bias"),
            "attention_bias": net.has("stack/0/mixer/query/bias"),
            "mlp_bias": net.has("stack/0/ffn/up/bias"),
            "classifier_bias": net.has("head/dense/bias"),
            "classifier_activation": decoder.activation_config(net, "head/activation"),
            "decoder_bias": net.has("head/head/bias"),
            "tie_word_embeddings": not net.has("head/head/linear/kernel"),
            "layer_types": [FULL if window is None else SLIDING for window in windows],
            "rope_parameters": {
                FULL: _rope_config(net, windows, full=True),
                SLIDING: _rope_config(net, windows, full=False),
            },
        } | ({"local_attention": 2 * (min(local) - self._itself())} if local else {})

    def _itself(self) -> int:
        """Half of `local_attention` is what a token sees of each side, for a decoder counting itself."""
        return 0 if self.causal else 1

    def _kinds(self, config: ConfigJson) -> list[Kind]:
        depth, every = config.size("num_hidden_layers"), config.size("global_attn_every_n_layers", 3)
        types = config.take("layer_types", None) or [SLIDING if i % every else FULL for i in range(depth)]
        if not isinstance(types, list) or len(types) != depth or any(kind not in (FULL, SLIDING) for kind in types):
            raise Cannot(f"layer_types = {str(types)[:80]} must name {FULL} or {SLIDING} for each of {depth} layers")
        half = config.size("local_attention", 128) // 2
        config.expect("sliding_window", half)
        window = half + self._itself()
        return [Kind(None if kind == FULL else window, i == 0) for i, kind in enumerate(types)]


class ModernBertDecoder(ModernBert):
    """The same network as a decoder (Ettin)."""

    architectures = ("ModernBertDecoderForCausalLM",)
    model_type = "modernbert-decoder"
    tensors = _rules(APART, "lm_head")
    causal = True


def _norm(config: ConfigJson) -> Callable:
    return F(LayerNorm, eps=config.take("norm_eps", 1e-5), bias=config.take("norm_bias", False))


def _ropes(config: ConfigJson) -> dict[str, Callable]:
    """The rotary embedding of each type of layer, from `rope_parameters` or the older keys."""
    older = {FULL: config.take("global_rope_theta", 160000.0), SLIDING: config.take("local_rope_theta", 10000.0)}
    given = config.within("rope_parameters")
    found = {}
    for kind, base in older.items():
        of_kind = None if given is None else given.within(kind)
        if of_kind is not None:
            of_kind.expect("rope_type", "default")
            base = of_kind.take("rope_theta", float(base))
            of_kind.finish()
        found[kind] = F(RoPE, base=float(base))
    if given is not None:
        given.finish()
    return found


def _rope_config(net: Structure, windows: list[int | None], *, full: bool) -> dict[str, Any]:
    """Of the first layer of that type; where there is none, anything will do."""
    layer = next((i for i, window in enumerate(windows) if (window is None) == full), 0)
    rope = decoder.rope_config(net.value(f"stack/{layer}/mixer/rope"))
    if rope.keys() != {"rope_theta"}:
        raise Cannot(f"the rotary embedding of layer {layer} is not plain")
    return {"rope_type": "default"} | rope
