"""The jobs on networks with more than plain parameters: selection biases, zero-centred norms, an encoder."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from maxlike import config
from maxlike.convert import export_job, families, import_job, structure
from maxlike.convert.tensors import expand
from tests.reference import checkpoint

BINDINGS = ["experiment.Experiment.hooks = ()", "experiment.Experiment.batch_size = 2", "steps = 1"]
NONE = dict.fromkeys(checkpoint.CONFIG)
SHARED = NONE | {
    "vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6,
}  # fmt: skip
NETWORKS = {
    "deepseek_v3": SHARED | {
        "architectures": ["DeepseekV3ForCausalLM"], "intermediate_size": 32, "first_k_dense_replace": 1,
        "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "tie_word_embeddings": True,
    },
    "qwen3_next": SHARED | {
        "architectures": ["Qwen3NextForCausalLM"], "head_dim": 8, "num_experts": 4, "intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
        "tie_word_embeddings": True, "norm_topk_prob": True, "max_position_embeddings": 99,
    },
    "t5": NONE | {
        "architectures": ["T5ForConditionalGeneration"], "vocab_size": 2048, "d_model": 16, "d_kv": 8, "d_ff": 32,
        "num_heads": 2, "num_layers": 1, "layer_norm_epsilon": 1e-6,
    },
}  # fmt: skip


def write(directory, values, extra=(), *, mtp=False):
    """A checkpoint with random tensors of that config.json, and those of `extra`; mtp: with modules that look ahead."""
    family, factory = families.network(values, "config.json", mtp=mtp)
    rng = np.random.default_rng(0)
    shapes = {name: tensor.shape for name, tensor in expand(family.tensors, structure.of(factory)).items()}
    weights = {name: rng.standard_normal(shape, np.float32) * 0.2 for name, shape in shapes.items()}
    checkpoint.write(directory, weights | {name: np.zeros(2, np.float32) for name in extra}, **values)
    return weights


def load(source, *more):
    bindings = [f"source = '{source}'", "experiment.Experiment.optimizer = @adamw.AdamW()", *BINDINGS, *more]
    return config.load("quickstart", overlays=["pretrained"], bindings=bindings)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "t5" else pytest.mark.large) for name in NETWORKS]
)
def test_import_and_export(name, tmp_path, capsys):
    """What is not imported is named; the export holds the same numbers, and in half precision keeps those whole that
    half precision would change: selection biases and zero-centred gains."""
    beside = {"deepseek_v3": "model.layers.2.eh_proj.weight", "qwen3_next": "mtp.norm.weight"}.get(name)
    weights = write(tmp_path / "theirs", NETWORKS[name], [] if beside is None else [beside])
    experiment = load(tmp_path / "theirs")
    import_job.import_weights(experiment, tmp_path / "run")
    said = capsys.readouterr().out
    assert beside is None or f"left behind: {beside}" in said
    export_job.export(experiment, tmp_path / "run", destination=str(tmp_path / "ours"))
    export_job.export(experiment, tmp_path / "run", destination=str(tmp_path / "half"), dtype="bfloat16")
    assert "exactly the model's" in capsys.readouterr().out
    whole, half = (safetensors.numpy.load_file(tmp_path / kind / "model.safetensors") for kind in ("ours", "half"))
    assert whole.keys() == half.keys() == weights.keys()
    kept = {path for path, value in half.items() if value.dtype == np.float32}
    marks = {"deepseek_v3": ("e_score_correction_bias",), "qwen3_next": ("layernorm", "_norm", "model.norm"), "t5": ()}
    assert kept == {path for path in weights if any(mark in path for mark in marks[name])}
    for path, value in weights.items():
        np.testing.assert_allclose(whole[path], value, atol=3e-7 if path in kept else 0, rtol=0)
        if path not in kept:
            np.testing.assert_array_equal(half[path], value.astype(jnp.bfloat16))
    again = json.loads((tmp_path / "ours/config.json").read_text())
    given = {key: value for key, value in NETWORKS[name].items() if value is not None}
    assert {key: again[key] for key in given} == given


@pytest.mark.large
def test_modules_that_look_ahead_go_in_and_out(tmp_path, capsys):
    """The export proves them by their own logits, and holds the embedding again, which serves as their head too."""
    values = NETWORKS["deepseek_v3"] | {"num_nextn_predict_layers": 1}
    weights = write(tmp_path / "theirs", values, mtp=True)
    plain, experiment = (load(tmp_path / "theirs", *more) for more in ((), ("pretrained.Pretrained.mtp = True",)))
    import_job.import_weights(plain, tmp_path / "plain")
    assert "left behind: model.layers.2.eh_proj.weight" in capsys.readouterr().out
    import_job.import_weights(experiment, tmp_path / "run")
    assert "left behind" not in capsys.readouterr().out
    export_job.export(experiment, tmp_path / "run", destination=str(tmp_path / "ours"))
    assert "exactly the model's" in capsys.readouterr().out
    written = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    twice = {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    assert written.keys() == weights.keys() | twice
    for path, value in written.items():
        expected = weights["model.embed_tokens.weight" if path in twice else path]
        np.testing.assert_allclose(value, expected, atol=3e-7, rtol=0)
    assert json.loads((tmp_path / "ours/config.json").read_text())["num_nextn_predict_layers"] == 1
