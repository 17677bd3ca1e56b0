"""Every family against the class of `transformers` that it names: tiny random models with the awkward cases."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.context import Context
from maxlike import checkpoint_tree
from maxlike.convert import export_job, families, transfer
from maxlike.convert.structure import Structure
from maxlike.convert.tensor_files import TensorFiles
from maxlike.decode.loop import generate
from maxlike.decode.sampling import Sampling, SamplingRows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # models this small lose more to waiting for each other than they gain

T, NEW, VOCAB = 12, 64, 96
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
    "num_hidden_layers": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
MIXED = {
    "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}  # fmt: skip
CASES = {
    "llama tied, MHA": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama 3.1, GQA, eps": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 3e-4, "rope_parameters": LLAMA3},
    ),
    "llama biases, odd head": (
        "Llama",
        {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    ),
    "mistral window": ("Mistral", {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5}),
    "qwen2 tied, YaRN": (
        "Qwen2",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": YARN, "rms_norm_eps": 1e-5},
    ),
    "qwen2 windows": ("Qwen2", MIXED),
    "qwen3 head_dim": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-5}),
    "starcoder2": ("Starcoder2", {"num_key_value_heads": 2, "sliding_window": 9, "norm_epsilon": 1e-3}),
    "glm": (
        "Glm",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 5e6},
        },
    ),
    "glm4": ("Glm4", {"num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-4}),
    "gpt2": ("GPT2", {}),
    "gpt2 untied, exact gelu": (
        "GPT2",
        {"n_inner": 44, "tie_word_embeddings": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    ),
}
CASES["gpt2"][1].update(n_head=4, n_layer=2, n_embd=32, n_positions=128, vocab_size=VOCAB)
CASES["gpt2 untied, exact gelu"][1].update(CASES["gpt2"][1])


def reference(name: str, directory):
    """(tokens with 64 greedy ones behind them, logits) of a random model of `transformers`, which is saved."""
    kind, changes = CASES[name]
    shape = {} if kind == "GPT2" else SHAPE
    config = getattr(transformers, f"{kind}Config")(**{**shape, **NO_TOKENS, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = weight.ndim == 1 and path.endswith("weight")
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if gain else 0.0))
    model.save_pretrained(directory)
    prompt = torch.tensor(np.random.default_rng(1).integers(0, VOCAB, (2, T)))
    tokens = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert tokens.shape == (2, T + NEW)
    return tokens.numpy().astype(np.int32), logits_of(model, tokens)


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.int64)).logits.numpy()


def imported(directory):
    """(family, graph, parameters, structure) through the loader that the job uses."""
    family, factory, _ = families.read(directory)
    graph, state = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0))))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = nnx.to_pure_dict(state)
    flat = checkpoint_tree.flatten(params)
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in flat.items()}
    net = Structure(nnx.merge(graph, params))
    loaded = transfer.load(TensorFiles(directory), family, net, abstract)
    return family, graph, jax.tree.unflatten(jax.tree.structure(params), [loaded[path] for path in flat]), net


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, tokens):
    model = nnx.merge(graph, params)
    return model.logits(model(tokens, Context.of(tokens)).hidden_BTD)


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    """The same logits along the greedy continuation of `transformers`, whose every token they choose too."""
    tokens, logits = reference(name, tmp_path / "theirs")
    family, graph, params, net = imported(tmp_path / "theirs")
    found = np.asarray(run(graph, params, tokens))
    worst = float(np.abs(found - logits).max())
    record_property(f"worst {name}", worst)
    assert worst <= 1e-4
    assert np.array_equal(found[:, T - 1 : -1].argmax(-1), tokens[:, T:])

    chosen, config = export_job.describe(net, family.model_type)
    out = tmp_path / "ours"
    out.mkdir()
    lengths = {} if family.length_key is None else {family.length_key: 128}
    (out / "config.json").write_text(json.dumps(config | lengths | NO_TOKENS))
    transfer.store(chosen, net, checkpoint_tree.flatten(params), directory=out, dtype="float32", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert np.abs(logits_of(loaded.eval(), tokens) - logits).max() <= 1e-6


def test_bert_gives_the_same_hidden_states(tmp_path, record_property):
    """One segment; the export, without token types of its own, is the same function."""
    config = transformers.BertConfig(**SHAPE, type_vocab_size=3, layer_norm_eps=1e-3, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, T))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).last_hidden_state.numpy()
    family, graph, params, net = imported(tmp_path / "theirs")
    found = jax.jit(lambda params, x: nnx.merge(graph, params)(x, Context.of(x)).hidden_BTD)(params, tokens)
    worst = float(np.abs(np.asarray(found) - theirs).max())
    record_property("worst bert (hidden states)", worst)
    assert worst <= 1e-4
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/config.json").write_text(json.dumps(export_job.describe(net)[1]))
    flat = checkpoint_tree.flatten(params)
    transfer.store(family, net, flat, directory=tmp_path / "ours", dtype="float32", shard_bytes=10**9)
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        assert np.abs(again(torch.tensor(tokens)).last_hidden_state.numpy() - theirs).max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen2 windows"])
def test_decoding_an_imported_model_gives_the_same_64_tokens(name, tmp_path):
    tokens, _ = reference(name, tmp_path)
    _, graph, params, _ = imported(tmp_path)

    @jax.jit
    def decode(params, prompt):
        sampling = SamplingRows.of([Sampling(temperature=0.0)] * 2)
        rows = (jnp.full(2, T), sampling, jnp.full(2, NEW), jnp.array([-1]), jax.random.key(0))
        return generate(nnx.merge(graph, params), prompt, *rows, max_new=NEW).tokens_BN

    assert np.array_equal(decode(params, tokens[:, :T]), tokens[:, T:])
