"""GPT-2."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from layers.attention import Attention
from layers.block import Block
from layers.embed import Embed
from layers.mlp import MLP
from layers.norm import LayerNorm
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Flat, Fused, Matrix
from maxlike.convert.structure import Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule

LAYER, OURS = "transformer.h.{i}.", "stack/{i}/"


def _qkv(part: str) -> tuple[str, ...]:
    return tuple(f"{OURS}mixer/{name}/{part}" for name in ("query", "key", "value"))


class Gpt2(Family):
    """Learned positions, LayerNorm, biases everywhere, tanh-GELU (Radford et al. 2019). Its matrices are [in, out]."""

    architectures = ("GPT2LMHeadModel",)
    model_type = "gpt2"
    prefix = "transformer."
    ignored = (r".*\.attn\.(masked_)?bias",)  # the causal mask that old files carry
    tied: ClassVar = {"lm_head.weight": "transformer.wte.weight"}
    length_key = None
    tensors = (
        Rule("transformer.wte.weight", "embed/table", TABLE),
        Rule("transformer.wpe.weight", "embed/positions", TABLE),
        Rule("lm_head.weight", "head/linear/kernel"),
        Rule(f"{LAYER}attn.c_attn.weight", _qkv("kernel"), Fused(Matrix(), axis=1)),
        Rule(f"{LAYER}attn.c_attn.bias", _qkv("bias"), Fused(Flat())),
        Rule(f"{LAYER}attn.c_proj.weight", f"{OURS}mixer/out/kernel", Matrix(2)),
        Rule(f"{LAYER}attn.c_proj.bias", f"{OURS}mixer/out/bias", BIAS),
        *(
            Rule(f"{LAYER}mlp.{name}.{kind}", f"{OURS}ffn/{part}/{ours}", form)
            for name, part in (("c_fc", "up"), ("c_proj", "down"))
            for kind, ours, form in (("weight", "kernel", Matrix()), ("bias", "bias", BIAS))
        ),
        *(
            Rule(f"{name}.{kind}", f"{ours}/{part}", BIAS)
            for name, ours in (
                (f"{LAYER}ln_1", f"{OURS}mixer_norm"),
                (f"{LAYER}ln_2", f"{OURS}ffn_norm"),
                ("transformer.ln_f", "norm"),
            )
            for kind, part in (("weight", "gain"), ("bias", "bias"))
        ),
    )

    def network(self, config: ConfigJson) -> Callable:
        config.ignore("n_ctx", "reorder_and_upcast_attn", "attn_pdrop", "embd_pdrop", "resid_pdrop")
        config.ignore(*(f"summary_{kind}" for kind in ("activation", "type", "use_proj")))
        config.ignore("summary_first_dropout", "summary_proj_to_labels", "n_special", "predict_special_tokens")
        config.expect("scale_attn_weights", True)
        config.expect("scale_attn_by_inverse_layer_idx", False)
        config.expect("add_cross_attention", False)
        mixer = functools.partial(Attention, heads=config.size("n_head", 12), qkv_bias=True, out_bias=True)
        width = config.size("n_inner", 4 * config.size("n_embd"))
        activation = config.choose("activation_function", decoder.ACTIVATIONS, "gelu_new")
        ffn = functools.partial(MLP, width=width, activation=activation, bias=True)
        norm = functools.partial(LayerNorm, eps=config.take("layer_norm_epsilon", 1e-5))
        block = functools.partial(Block, mixer=mixer, ffn=ffn, norm=norm)
        embed = functools.partial(Embed, positions=config.size("n_positions", 1024))
        blocks = [block] * config.size("n_layer")
        return decoder.language_model(config, blocks, norm, tied=True, embed=embed, dim="n_embd")

    def config(self, net: Structure) -> dict[str, Any]:
        dim, heads, _ = net.shape("stack/0/mixer/query/kernel")
        activation = decoder.activation_config(net)
        return {
            "vocab_size": net.value("vocab"),
            "n_embd": dim,
            "n_layer": net.depth(),
            "n_head": heads,
            "n_inner": net.shape("stack/0/ffn/up/kernel")[-1],
            "n_positions": net.shape("embed/positions")[0],
            "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
            "layer_norm_epsilon": net.value("norm/eps"),
            "tie_word_embeddings": not net.has("head/linear/kernel"),
        }
