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

T, NEW, VOCAB = 12, 64, 96
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
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
}


@functools.cache
def reference(name: str, directory):
    """A random model of `transformers`, saved; its logits and greedy continuation."""
    kind, changes = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    heads = {"GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, heads.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = weight.ndim == 1 and path.endswith("weight")
            weight.copy_(torch.randn_like(weight) * 0.3 + (1.0 if gain else 0.0))
    model.save_pretrained(directory)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, T))
    return tokens, *answers(model, tokens)


def answers(model, tokens):
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
        greedy = model.generate(torch.tensor(tokens), max_new_tokens=NEW, do_sample=False)[:, T:].numpy()
    return logits, greedy


def imported(directory):
    """(family, graph, parameters by leaf, factory) through the loader that the job uses."""
    family, factory, _ = families.read(directory)
    graph, state = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0))))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = nnx.to_pure_dict(state)
    flat = checkpoint_tree.flatten(params)
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in flat.items()}
    net = Structure(nnx.merge(graph, params))
    loaded = transfer.load(TensorFiles(directory), family, net, abstract)
    return family, graph, jax.tree.unflatten(jax.tree.structure(params), [loaded[path] for path in flat]), net


def ours(graph, params, tokens):
    """Logits of the whole row, and 64 greedy tokens through the cache, in one program."""

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graph, params)
        logits = model.logits(model(tokens, Context.of(tokens)).hidden_BTD)
        sampling = SamplingRows.of([Sampling(temperature=0.0)] * 2)
        made = generate(
            model, tokens, jnp.full(2, T), sampling, jnp.full(2, NEW), jnp.array([-1]), jax.random.key(0),
            max_new=NEW, cache_dtype=jnp.float32,
        )  # fmt: skip
        return logits, made.tokens_BN

    return map(np.asarray, run(params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_agree_with_transformers(name, tmp_path, record_property):
    tokens, logits, greedy = reference(name, tmp_path / "theirs")
    family, graph, params, net = imported(tmp_path / "theirs")
    found, continued = ours(graph, params, tokens)
    worst = float(np.abs(found - logits).max())
    record_property(f"worst {name}", worst)
    assert worst <= 1e-4
    assert np.array_equal(continued, greedy)

    chosen, config = export_job.describe(net, family.model_type)
    out = tmp_path / "ours"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    transfer.store(chosen, net, checkpoint_tree.flatten(params), directory=out, dtype="float32", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again, _ = answers(loaded.eval(), tokens)
    assert np.abs(again - logits).max() <= 1e-6
