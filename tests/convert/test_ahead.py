"""Modules that predict further ahead, in and out of the files that hold them."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from maxlike import checkpoint_tree
from maxlike.convert import export_job, families, proof, structure, transfer
from maxlike.convert.structure import Cannot
from maxlike.convert.tensor_files import without
from maxlike.convert.tensors import expand
from maxlike.errors import UserError

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "moe_intermediate_size": 8, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 14, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
DEEPSEEK = SHAPE | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
NEXT = SHAPE | {
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
# The class, its configuration, that of one layer as the module has it, and the module's names: the layer, the final
# norm, the norms and the matrix in front of it, and what is there a second time.
CASES = {
    "deepseek_v3": (
        "DeepseekV3", DEEPSEEK | {"first_k_dense_replace": 1}, {"first_k_dense_replace": 0},
        "model.layers.2.", "shared_head.norm.weight", ("enorm.weight", "hnorm.weight", "eh_proj.weight"),
        {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"},
    ),
    "qwen3_next": (
        "Qwen3Next", NEXT | {"layer_types": ["linear_attention", "full_attention"]},
        {"layer_types": ["full_attention"]},
        "mtp.layers.0.", "mtp.norm.weight",
        ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.fc.weight"), {},
    ),
}  # fmt: skip
LONGCAT = {
    "architectures": ["LongcatFlashForCausalLM"], "vocab_size": 96, "hidden_size": 32, "num_layers": 2,
    "num_attention_heads": 4, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 8, "n_routed_experts": 4,
    "zero_expert_num": 2, "moe_topk": 2, **LATENT,
}  # fmt: skip


def put(prefix: str, name: str) -> str:
    return name if name.startswith("mtp.") else prefix + name


@pytest.mark.parametrize("name", CASES)
def test_a_module_predicts_what_a_layer_of_transformers_does(name, tmp_path, record_property):
    """transformers leaves these tensors unread, so a module is put together of its parts: norms, a matrix, and a model
    of one layer that is given hidden states."""
    parity = pytest.importorskip("tests.reference.parity")
    torch = pytest.importorskip("torch")
    kind, knobs, one, prefix, final, front, twice = CASES[name]
    trunk, further = (parity.build(kind, knobs | more, 0.15) for more in ({}, one | {"num_hidden_layers": 1}))
    norms = [type(trunk.model.norm)(32, eps=1e-6) for _ in range(2)]
    join = torch.nn.Linear(64, 32, bias=False)
    for part in (*norms, join, further):
        parity.randomise(part, 0.15)
    further.lm_head = trunk.lm_head
    tokens = torch.tensor(np.random.default_rng(2).integers(0, 96, (2, 12)))
    with torch.no_grad():
        hidden = trunk.model(tokens).last_hidden_state
        following = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        both = torch.cat([norms[0](trunk.model.embed_tokens(following)), norms[1](hidden)], -1)
        theirs = torch.cat([trunk(tokens).logits, further(inputs_embeds=join(both)).logits]).numpy()

    for model, folder in ((trunk, "trunk"), (further, "further")):
        model.save_pretrained(tmp_path / folder)
    layer = safetensors.numpy.load_file(tmp_path / "further/model.safetensors")
    weights = safetensors.numpy.load_file(tmp_path / "trunk/model.safetensors")
    module = {re.sub(r"^model\.layers\.0\.", prefix, key): x for key, x in layer.items() if "layers.0" in key}
    module[put(prefix, final)] = layer["model.norm.weight"]
    for key, part in zip(front, (*norms, join), strict=True):
        module[put(prefix, key)] = part.weight.detach().numpy()
    module |= {prefix + copy: weights[other] for copy, other in twice.items()}
    safetensors.numpy.save_file(weights | module, tmp_path / "trunk/model.safetensors")
    path = tmp_path / "trunk/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))

    family, graph, params, net = parity.imported(tmp_path / "trunk", mtp=True)
    ours = proof.logits(graph, params, {}, tokens.numpy().astype(np.int32))
    worst = float(np.abs(ours - theirs).max())
    record_property(f"worst {name}, further ahead", worst)
    assert worst <= 1e-4

    chosen, config = export_job.describe(net)
    assert chosen is family and config["num_nextn_predict_layers"] == 1
    tmp_path.joinpath("ours").mkdir()
    flat = checkpoint_tree.flatten(params)
    transfer.store(family, net, flat, directory=tmp_path / "ours", dtype="float32", shard_bytes=10**9)
    written = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    assert written.keys() == (weights | module).keys()
    for key, value in (weights | module).items():
        np.testing.assert_allclose(written[key], value, atol=3e-7, rtol=0)

    _, _, plain, without_it = parity.imported(tmp_path / "trunk")
    assert "mtp" not in plain
    assert set(weights) == set(without(weights | module, family.unused(without_it)))
    if twice:
        weights["lm_head.weight"] = weights["lm_head.weight"] + 1
        safetensors.numpy.save_file(weights | module, tmp_path / "trunk/model.safetensors")
        with pytest.raises(UserError, match=r"the architecture ties .*values differ: set LanguageModel.mtp to None"):
            parity.imported(tmp_path / "trunk", mtp=True)


def test_longcats_module_is_a_dense_layer_under_the_names_of_its_files():
    family, factory = families.network(LONGCAT | {"num_nextn_predict_layers": 1}, "config.json", mtp=True)
    net = structure.of(factory)
    shapes = {name: tensor.shape for name, tensor in expand(family.tensors, net).items() if ".mtp." in name}
    assert shapes == {
        "model.mtp.layers.0.eh_proj.weight": (32, 64), "model.mtp.layers.0.enorm.m.weight": (32,),
        "model.mtp.layers.0.hnorm.m.weight": (32,), "model.mtp.layers.0.input_layernorm.weight": (32,),
        "model.mtp.layers.0.post_attention_layernorm.weight": (32,), "model.mtp.norm.weight": (32,),
        "model.mtp.layers.0.self_attn.q_a_proj.weight": (14, 32),
        "model.mtp.layers.0.self_attn.q_a_layernorm.weight": (14,),
        "model.mtp.layers.0.self_attn.q_b_proj.weight": (40, 14),
        "model.mtp.layers.0.self_attn.kv_a_proj_with_mqa.weight": (16, 32),
        "model.mtp.layers.0.self_attn.kv_a_layernorm.weight": (12,),
        "model.mtp.layers.0.self_attn.kv_b_proj.weight": (44, 12),
        "model.mtp.layers.0.self_attn.o_proj.weight": (32, 20),
        "model.mtp.layers.0.transformer_layer.mlp.gate_proj.weight": (40, 32),
        "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight": (40, 32),
        "model.mtp.layers.0.transformer_layer.mlp.down_proj.weight": (32, 40),
    }  # fmt: skip
    assert family.copies(net) == {"model.mtp.embed_tokens.weight": "model.embed_tokens.weight"}
    assert export_job.describe(net)[0] is family
    assert "model.mtp.norm.weight" not in without(["model.mtp.norm.weight"], family.unused(structure.of(
        families.network(LONGCAT, "config.json")[1]
    )))  # fmt: skip


def test_a_family_without_modules_says_so():
    llama = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    with pytest.raises(Cannot, match="LlamaForCausalLM has no modules that predict further ahead"):
        families.network(llama, "config.json", mtp=True)
    two = LONGCAT | {"num_nextn_predict_layers": 2}
    with pytest.raises(Cannot, match="num_nextn_predict_layers = 2"):
        families.network(two, "config.json", mtp=True)
