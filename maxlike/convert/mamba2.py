"""Mamba-2."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from layers.block import Block
from layers.gated_norm import GatedRMSNorm
from layers.mamba2 import Mamba2 as Mixer
from layers.norm import RMSNorm
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.family import Family
from maxlike.convert.forms import Flat, Fused, Taps, Transposed
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import BIAS, TABLE, Rule

LAYER, OURS = "backbone.layers.{i}.", "stack/{i}/"
CONVOLVED = ("x", "B", "C")


class Mamba2(Family):
    """Mamba-2 (arXiv 2405.21060) in blocks that only mix. Its projections are one matrix there: gate, x, B, C, time
    steps; and so are the filters of its convolution."""

    architectures = ("Mamba2ForCausalLM",)
    model_type = "mamba2"
    length_key = None
    tied: ClassVar = {"lm_head.weight": "backbone.embeddings.weight"}
    tensors = (
        Rule("backbone.embeddings.weight", "embed/table", TABLE),
        Rule("backbone.norm_f.weight", "norm/gain", BIAS),
        Rule("lm_head.weight", "head/linear/kernel"),
        Rule(f"{LAYER}norm.weight", f"{OURS}mixer_norm/gain", BIAS),
        Rule(
            f"{LAYER}mixer.in_proj.weight",
            tuple(f"{OURS}mixer/{part}/kernel" for part in ("z", *CONVOLVED, "dt")),
            Fused(Transposed()),
        ),
        Rule(f"{LAYER}mixer.conv1d.weight", tuple(f"{OURS}mixer/{x}_conv/kernel" for x in CONVOLVED), Fused(Taps())),
        Rule(f"{LAYER}mixer.conv1d.bias", tuple(f"{OURS}mixer/{x}_conv/bias" for x in CONVOLVED), Fused(Flat())),
        *(Rule(f"{LAYER}mixer.{name}", f"{OURS}mixer/{name}", BIAS) for name in ("dt_bias", "A_log", "D")),
        Rule(f"{LAYER}mixer.norm.weight", f"{OURS}mixer/norm/gain", BIAS),
        Rule(f"{LAYER}mixer.out_proj.weight", f"{OURS}mixer/out/kernel", Transposed(2)),
    )

    def network(self, config: ConfigJson) -> Callable:
        config.expect("use_bias", False)
        config.expect("use_conv_bias", True)
        config.expect("hidden_act", "silu", "swish")
        config.ignore("residual_in_fp32", "rescale_prenorm_residual", "chunk_size", "rms_norm", "norm_before_gate")
        config.ignore(*(f"time_step_{kind}" for kind in ("rank", "min", "max", "floor", "init_scheme", "scale")))
        heads, head_dim = config.size("num_heads", 128), config.size("head_dim", 64)
        if config.size("hidden_size") * config.size("expand", 2) != heads * head_dim:
            raise Cannot(f"expand does not lead to {heads} heads of {head_dim}: bring back a good config.json")
        eps = config.take("layer_norm_epsilon", 1e-5)
        mixer = functools.partial(
            Mixer,
            heads=heads,
            head_dim=head_dim,
            state=config.size("state_size", 128),
            groups=config.size("n_groups", 8),
            conv_width=config.size("conv_kernel", 4),
            dt_limits=_limits(config.take("time_step_limit", None)),
            norm=functools.partial(GatedRMSNorm, eps=eps),
        )
        norm = functools.partial(RMSNorm, eps=eps)
        block = functools.partial(Block, mixer=mixer, ffn=None, norm=norm)
        return decoder.language_model(config, [block] * config.size("num_hidden_layers"), norm)

    def config(self, net: Structure) -> dict[str, Any]:
        mixer = "stack/0/mixer"
        dim, heads, head_dim = net.shape(f"{mixer}/z/kernel")
        _, groups, state = net.shape(f"{mixer}/B/kernel")
        if heads * head_dim % dim:
            raise Cannot(f"{heads} heads of {head_dim} are no multiple of the width {dim}")
        limits = net.value(f"{mixer}/dt_limits")
        return {
            "vocab_size": net.value("vocab"),
            "hidden_size": dim,
            "num_hidden_layers": net.depth(),
            "num_heads": heads,
            "head_dim": head_dim,
            "expand": heads * head_dim // dim,
            "n_groups": groups,
            "state_size": state,
            "conv_kernel": net.shape(f"{mixer}/x_conv/kernel")[0],
            "chunk_size": 256,
            "layer_norm_epsilon": net.value("norm/eps"),
            "tie_word_embeddings": not net.has("head/linear/kernel"),
        } | ({} if limits is None else {"time_step_limit": list(limits)})


def _limits(given: Any) -> tuple[float, float] | None:
    """Bounds of the time steps; None where they bound nothing."""
    if given is None:
        return None
    if isinstance(given, list):
        given = [math.inf if x == {"__float__": "Infinity"} else x for x in given]
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(x, int | float) for x in given):
        raise Cannot(f"time_step_limit = {given!r} must be two numbers: bring back a good config.json")
    low, high = map(float, given)
    return None if (low, high) == (0.0, math.inf) else (low, high)
