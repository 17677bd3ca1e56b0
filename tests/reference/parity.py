"""A random model of `transformers` against ours: imported, run along its own greedy continuation, exported again."""

import functools
import json
import pathlib

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


def build(kind: str, knobs: dict, std: float):
    """A model with random weights, gains, offsets and selection biases."""
    config = getattr(transformers, f"{kind}Config")(**{**NO_TOKENS, **knobs}, attn_implementation="eager")
    torch.manual_seed(0)
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    randomise(model, std)
    return model


def randomise(model, std: float) -> None:
    with torch.no_grad():
        for path, weight in model.named_parameters():
            gain = weight.ndim == 1 and path.endswith("weight")
            weight.copy_(torch.randn_like(weight) * std + (weight.mean() if gain else 0.0))  # gains start at 1, or at 0
        for path, bias in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                bias.copy_(torch.randn_like(bias) * std)


def reference(kind: str, knobs: dict, directory: pathlib.Path, *, cached: bool = True, std: float = 0.3):
    """(tokens with 64 greedy ones behind them, logits) of a random model, which is saved. cached: whether they come
    out of its cache. std: of the weights; where a rounding grows too much on its way, a smaller one."""
    model = build(kind, knobs, std)
    model.save_pretrained(directory)
    prompt = torch.tensor(np.random.default_rng(1).integers(0, VOCAB, (2, T)))
    tokens = model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=cached)
    assert tokens.shape == (2, T + NEW)
    return tokens.numpy().astype(np.int32), logits_of(model, tokens)


def logits_of(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens, dtype=torch.int64)).logits.numpy()


def imported(directory: pathlib.Path, mtp: bool = False):
    """(family, graph, parameters and buffers, structure) through the loader that the job uses."""
    family, factory, _ = families.read(directory, mtp=mtp)
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


def decoded(graph, params, tokens) -> np.ndarray:
    """The 64 tokens that our own loop makes of the prompts, greedily, out of its cache."""

    @jax.jit
    def decode(params, prompt):
        sampling = SamplingRows.of([Sampling(temperature=0.0)] * 2)
        rows = (jnp.full(2, T), sampling, jnp.full(2, NEW), jnp.array([-1]), jax.random.key(0))
        return generate(nnx.merge(graph, params), prompt, *rows, max_new=NEW).tokens_BN

    return np.asarray(decode(params, tokens[:, :T]))


def exported(net: Structure, params, model_type: str, out: pathlib.Path, knobs: dict | None = None) -> pathlib.Path:
    """Writes config.json, with the special tokens among `knobs`, and several shards as the job does."""
    chosen, config = export_job.describe(net, model_type)
    out.mkdir()
    lengths = {} if chosen.length_key is None else {chosen.length_key: 128}
    tokens = NO_TOKENS | {key: value for key, value in (knobs or {}).items() if key.endswith("_token_id")}
    (out / "config.json").write_text(json.dumps(config | lengths | tokens))
    transfer.store(chosen, net, checkpoint_tree.flatten(params), directory=out, dtype="float32", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


def reloaded(out: pathlib.Path, auto: str = "AutoModelForCausalLM"):
    """The export in `transformers`, which misses nothing and has nothing left over."""
    loaded, report = getattr(transformers, auto).from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def agree(
    name: str, kind: str, knobs: dict, tmp_path: pathlib.Path, record_property, *, complete=None, decode=False, **how
):
    """The same logits along the greedy continuation of `transformers`, whose every token they choose too; and what is
    exported is the same model there. complete: what must be done to the export's directory first.
    decode: whether our loop decodes too."""
    tokens, logits = reference(kind, knobs, tmp_path / "theirs", **how)
    family, graph, params, net = imported(tmp_path / "theirs")
    found = np.asarray(run(graph, params, tokens))
    worst = float(np.abs(found - logits).max())
    record_property(f"worst {name}", worst)
    assert worst <= 1e-4
    assert np.array_equal(found[:, T - 1 : -1].argmax(-1), tokens[:, T:])
    if decode:
        assert np.array_equal(decoded(graph, params, tokens), tokens[:, T:])
    out = exported(net, params, family.model_type, tmp_path / "ours", knobs)
    if complete is not None:
        complete(out)
    again = reloaded(out)
    assert np.abs(logits_of(again, tokens) - logits).max() <= 1e-5
