"""What the decoders of the Llama lineage share: keys of config.json, names of tensors, grouping of layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from layers.attention import Attention
from layers.embed import Embed, Head
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import LinearScaling, Llama3Scaling, RoPE, YaRN
from layers.stack import Stack
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.forms import Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule

F = functools.partial
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
LAYER, OURS = "model.layers.{i}.", "stack/{i}/"
LONGEST_PATTERN = 16

EMBEDDINGS = (
    Rule("model.embed_tokens.weight", "embed/table", TABLE),
    Rule("lm_head.weight", "head/linear/kernel"),
    Rule("model.norm.weight", "norm/gain", BIAS),
    Rule("model.norm.bias", "norm/bias", BIAS),
)
ATTENTION = (
    *(
        Rule(f"{LAYER}self_attn.{short}_proj.weight", f"{OURS}mixer/{name}/kernel")
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    *(
        Rule(f"{LAYER}self_attn.{short}_proj.bias", f"{OURS}mixer/{name}/bias", BIAS)
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
    ),
    Rule(f"{LAYER}self_attn.o_proj.weight", f"{OURS}mixer/out/kernel", Transposed(2)),
    Rule(f"{LAYER}self_attn.q_norm.weight", f"{OURS}mixer/query_norm/gain", BIAS),
    Rule(f"{LAYER}self_attn.k_norm.weight", f"{OURS}mixer/key_norm/gain", BIAS),
)
GATED_MLP = tuple(
    Rule(f"{LAYER}mlp.{part}_proj.{kind}", f"{OURS}ffn/{part}/{ours}", form)
    for part in ("gate", "up", "down")
    for kind, ours, form in (("weight", "kernel", Transposed()), ("bias", "bias", BIAS))
)
PRE_NORMS = tuple(
    Rule(f"{LAYER}{name}.{kind}", f"{OURS}{ours}/{part}", BIAS)
    for name, ours in (("input_layernorm", "mixer_norm"), ("post_attention_layernorm", "ffn_norm"))
    for kind, part in (("weight", "gain"), ("bias", "bias"))
)


def rms_norm(config: ConfigJson) -> Callable:
    return F(RMSNorm, eps=config.take("rms_norm_eps", 1e-6))


def gated_mlp(config: ConfigJson, *, bias: bool = False, width: str = "intermediate_size") -> Callable:
    activation = config.choose("hidden_act", ACTIVATIONS, "silu")
    return F(GatedMLP, width=config.size(width), activation=activation, bias=bias)


def attention(
    config: ConfigJson,
    *,
    rope: Callable | None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: Callable | None = None,
    window: int | None = None,
) -> Callable:
    """Attention with the heads that the usual keys tell."""
    heads = config.size("num_attention_heads")
    head_dim = config.take("head_dim", None)
    return F(
        Attention,
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=None if head_dim is None else config.size("head_dim"),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=qk_norm,
        window=window,
        rope=rope,
    )


def rope(config: ConfigJson, *, layout: str = "half", fraction: float = 1.0) -> Callable:
    """The rotary embedding, from `rope_parameters` (newer files) or `rope_theta` and `rope_scaling`.
    fraction: what the family rotates where the file does not say."""
    base, fraction = config.take("rope_theta", 10000.0), config.take("partial_rotary_factor", fraction)
    given = config.within("rope_parameters") or config.within("rope_scaling")
    config.ignore("rope_parameters", "rope_scaling")
    scaling = None
    if given is not None:
        base, fraction = given.take("rope_theta", float(base)), given.take("partial_rotary_factor", float(fraction))
        scaling = _scaling(given, config)
        given.finish()
    return F(RoPE, base=float(base), fraction=float(fraction), layout=layout, scaling=scaling)


def _scaling(given: ConfigJson, config: ConfigJson) -> Callable | None:
    older = given.take("type", "default")
    kind = given.choose("rope_type", {k: k for k in ("default", "linear", "llama3", "yarn")}, older)
    if kind == "default":
        return None
    factor = float(given.take("factor"))
    if kind == "linear":
        return F(LinearScaling, factor=factor)
    length = given.take("original_max_position_embeddings", config.take("max_position_embeddings", 0)) or None
    if length is None:
        raise Cannot(f"rope type {kind!r} needs original_max_position_embeddings: add it to config.json")
    if kind == "llama3":
        low, high = float(given.take("low_freq_factor")), float(given.take("high_freq_factor"))
        return F(
            Llama3Scaling, factor=factor, original_length=length, low_frequency_factor=low, high_frequency_factor=high
        )
    attention_factor = given.take("attention_factor", None)
    mscale, all_dim = given.take("mscale", None), given.take("mscale_all_dim", None)
    if attention_factor is None and mscale and all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return F(
        YaRN,
        factor=factor,
        original_length=length,
        beta_fast=float(given.take("beta_fast", 32.0)),
        beta_slow=float(given.take("beta_slow", 1.0)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=given.take("truncate", True),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's growth of the scores with the length: 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_config(rope: Any) -> dict[str, Any]:
    """The keys that describe a rotary embedding, in the form that every reader of config.json knows."""
    if not isinstance(rope, RoPE):
        raise Cannot(f"the position embedding {type(rope).__name__} has no counterpart")
    keys: dict[str, Any] = {"rope_theta": rope.base}
    if rope.fraction != 1.0:
        keys["partial_rotary_factor"] = rope.fraction
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        keys["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        keys["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }
    elif isinstance(scaling, YaRN):
        keys["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        } | ({} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor})
    elif scaling is not None:
        raise Cannot(f"the rope scaling {type(scaling).__name__} has no counterpart")
    return keys


def grouped(kinds: Sequence[Any]) -> tuple[int, int]:
    """(number of prefix layers, length of the pattern) that describe a list of kinds of layers with the fewest blocks:
    every kind from the prefix on repeats with the pattern's period."""
    best = (len(kinds) - 1, 1)
    for size in range(1, min(LONGEST_PATTERN, len(kinds)) + 1):
        for prefix in range(min(len(kinds) - size, sum(best) - size) + 1):
            rest = kinds[prefix:]
            if len(rest) % size == 0 and all(rest[i] == rest[i % size] for i in range(size, len(rest))):
                best = min(best, (prefix, size), key=lambda choice: (sum(choice), choice[1]))
                break
    return best


def language_model(
    config: ConfigJson,
    kinds: Sequence[Any],
    norm: Callable | None,
    *,
    block: Callable[[Any], Callable] = lambda kind: kind,
    tied: bool = False,
    embed: Callable = Embed,
    head: Callable[[Callable], Callable] = lambda head: head,
    dim: str = "hidden_size",
) -> Callable:
    """The network of embedding, one block a kind (`block(kind)` is its factory; equal kinds are equal layers), final
    norm and head. tied: what the family does where the file does not say. head: what it puts around the plain one."""
    prefix, size = grouped(kinds)
    stack = F(
        Stack,
        prefix=tuple(block(kind) for kind in kinds[:prefix]),
        pattern=tuple(block(kind) for kind in kinds[prefix : prefix + size]),
        depth=len(kinds) - prefix,
    )
    plain = F(Head, tied=config.take("tie_word_embeddings", tied))
    sizes = {"vocab": config.size("vocab_size"), "dim": config.size(dim)}
    return F(LanguageModel, **sizes, stack=stack, norm=norm, embed=embed, head=head(plain))


def sizes_config(net: Structure, mixer: str = "stack/0/mixer") -> dict[str, Any]:
    """Sizes of vocabulary, depth and attention, and the rotary embedding; mixer: path of an attention."""
    dim, heads, head_dim = _three(net.shape(f"{mixer}/query/kernel"))
    _, kv_heads, _ = _three(net.shape(f"{mixer}/key/kernel"))
    return {
        "vocab_size": net.value("vocab"),
        "hidden_size": dim,
        "num_hidden_layers": net.depth(),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": not net.has("head/linear/kernel"),
        **rope_config(net.value(f"{mixer}/rope")),
    }


def activation_config(net: Structure, path: str = "stack/0/ffn/activation") -> str:
    """The other libraries' name of the feed-forward's activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(net.value(path), net.value(path))


def config(net: Structure) -> dict[str, Any]:
    """The keys of a decoder with gated feed-forwards and RMSNorm."""
    return sizes_config(net) | {
        "intermediate_size": net.shape("stack/0/ffn/gate/kernel")[-1],
        "hidden_act": activation_config(net),
        "rms_norm_eps": net.value("norm/eps"),
    }


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise Cannot(f"a projection of shape {shape} is not one to heads")
    return shape
