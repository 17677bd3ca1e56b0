"""The same weights give the same output as the mixtures of experts of `transformers`: tiny random blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.balance import SignBias
from layers.context import Context
from layers.experts import Experts
from layers.mlp import GatedMLP
from layers.moe import MoE
from layers.routers import GroupLimit, TopK
from tests.reference.random import random_module

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock  # noqa: E402

F = functools.partial
D, E, WIDTH, SHARED, B, T = 16, 8, 12, 20, 2, 13
EXPERTS = F(Experts, count=E, width=WIDTH)
LIMITED = F(GroupLimit, groups=4, top_groups=2)
PAIRS = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(
            transformers.MixtralConfig(
                hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=2
            )
        ),
        F(MoE, router=F(TopK, top_k=2, norm_topk=True), experts=EXPERTS),
    ),
    "qwen2_moe": (
        lambda: Qwen2MoeSparseMoeBlock(
            transformers.Qwen2MoeConfig(
                hidden_size=D, moe_intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=3,
                shared_expert_intermediate_size=SHARED, norm_topk_prob=False,
            )
        ),
        F(MoE, router=F(TopK, top_k=3), experts=EXPERTS, shared=F(GatedMLP, width=SHARED), shared_gate=True),
    ),
    "deepseek_v3": (
        lambda: DeepseekV3MoE(
            transformers.DeepseekV3Config(
                hidden_size=D, moe_intermediate_size=WIDTH, n_routed_experts=E, num_experts_per_tok=3, n_group=4,
                topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
            )
        ),
        F(
            MoE, router=F(TopK, top_k=3, score="sigmoid", scale=2.5, bias=SignBias, limit=LIMITED), experts=EXPERTS,
            shared=F(GatedMLP, width=2 * WIDTH),
        ),
    ),
}  # fmt: skip


def ours_from(theirs: dict[str, np.ndarray], names: dict) -> dict:
    """Our parameters by the weights of a block of theirs, whose linear maps are [out, in]."""
    gate, up = np.split(theirs["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    params = {
        "router": {"kernel": theirs["gate.weight"].T},
        "experts": {"gate": gate, "up": up, "down": theirs["experts.down_proj"].swapaxes(1, 2)},
    }
    if "bias" in names["router"]:
        params["router"]["bias"] = theirs["gate.e_score_correction_bias"]
    shared = next((name.split(".")[0] for name in theirs if name.startswith("shared_expert")), None)
    if shared is not None:
        params["shared"] = {n: {"kernel": theirs[f"{shared}.{n}_proj.weight"].T} for n in ("gate", "up", "down")}
    if "shared_gate" in names:
        params["shared_gate"] = theirs["shared_expert_gate.weight"][0]
    return params


@pytest.mark.parametrize("name", PAIRS)
def test_same_weights_same_output(name, record_property):
    make, build = PAIRS[name]
    block = make()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (*block.parameters(), *block.buffers()):
            weight.copy_(0.3 * torch.randn_like(weight))
    x_BTD = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
    with torch.no_grad():
        want = block(torch.tensor(x_BTD)).numpy()
    graph, drawn, _ = random_module(lambda rngs: build(D, rngs=rngs))
    params = ours_from({key: value.numpy() for key, value in block.state_dict().items()}, drawn)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, drawn)
    got = jax.jit(lambda p, x: nnx.merge(graph, p)(x, Context.of(jnp.zeros((B, T))))[0])(params, x_BTD)
    record_property(f"worst {name} block", float(np.abs(np.asarray(got) - np.asarray(want)).max()))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
