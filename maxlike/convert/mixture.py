"""What decoders with mixtures of experts share: names of tensors, the keys of experts and losses."""

import functools
from collections.abc import Callable
from typing import Any

from layers.balance import LoadBalance
from layers.experts import Experts
from layers.mlp import GatedMLP
from layers.moe import MoE
from maxlike.convert import decoder
from maxlike.convert.config_json import ConfigJson
from maxlike.convert.structure import Cannot, Structure
from maxlike.convert.tensors import Rule

F = functools.partial


def experts(theirs: str, ours: str = "ffn", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")):
    """Rules of the experts of a layer, `theirs.experts.{e}.NAME`; names: of gate, up and down."""
    return tuple(
        Rule(f"{decoder.LAYER}{theirs}.experts.{{e}}.{name}.weight", f"{decoder.OURS}{ours}/experts/{part}")
        for name, part in zip(names, ("gate", "up", "down"), strict=True)
    )


def shared(theirs: str) -> tuple[Rule, ...]:
    """Rules of the feed-forward that all tokens pass."""
    return tuple(
        Rule(f"{decoder.LAYER}{theirs}.{part}_proj.weight", f"{decoder.OURS}ffn/shared/{part}/kernel")
        for part in ("gate", "up", "down")
    )


def router(theirs: str, ours: str = "ffn") -> Rule:
    """Rule of the router's weight."""
    return Rule(f"{decoder.LAYER}{theirs}.weight", f"{decoder.OURS}{ours}/router/kernel")


def moe(
    config: ConfigJson,
    router: Callable,
    *,
    count: int,
    width: int,
    shared_width: int | None = None,
    losses: tuple[Callable, ...] = (),
    **knobs: Any,
) -> Callable:
    """The mixture; knobs: further ones of MoE."""
    activation = config.choose("hidden_act", decoder.ACTIVATIONS, "silu")
    shared = None if shared_width is None else F(GatedMLP, width=shared_width, activation=activation)
    experts = F(Experts, count=count, width=width, activation=activation)
    return F(MoE, router=router, experts=experts, shared=shared, losses=losses, **knobs)


def balance(config: ConfigJson, *, top_k: int, layers: int) -> tuple[Callable, ...]:
    """The loss for a training that goes on: `router_aux_loss_coef` there is of the mean over layers, with a minimum of
    top_k; ours is of each layer, with a minimum of 1."""
    coefficient = config.take("router_aux_loss_coef", 0.0) * top_k / max(layers, 1)
    return (F(LoadBalance, coefficient=coefficient),) if coefficient > 0 else ()


def sparse(net: Structure) -> list[bool]:
    """Which layers have experts. Raises Cannot where none has."""
    found = [net.has(f"stack/{i}/ffn/experts/gate") for i in range(net.depth())]
    if not any(found):
        raise Cannot("the network has no experts")
    return found


def sizes_config(net: Structure, layer: int, mixer: str = "stack/0/mixer") -> dict[str, Any]:
    """Keys of vocabulary, depth and attention (at the path `mixer`), and of the feed-forward of a layer with experts
    but its sizes."""
    return decoder.sizes_config(net, mixer) | {
        "hidden_act": decoder.activation_config(net, f"stack/{layer}/ffn/experts/activation"),
        "rms_norm_eps": net.value("norm/eps"),
        "num_experts_per_tok": net.value(f"stack/{layer}/ffn/router/top_k"),
    }
