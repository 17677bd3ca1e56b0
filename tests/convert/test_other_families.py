"""Families that are no transformer decoders against `transformers`."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from layers.context import Context, Source
from tests.reference.parity import (
    NEW,
    NO_TOKENS,
    SHAPE,
    VOCAB,
    agree,
    exported,
    imported,
    logits_of,
    randomise,
    reloaded,
    run,
    torch,
    transformers,
)

MAMBA2 = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8, "state_size": 10,
    "chunk_size": 16,
}  # fmt: skip
MAMBAS = {
    "mamba2, groups": {"n_groups": 3, "layer_norm_epsilon": 1e-4, "conv_kernel": 3},
    "mamba2 tied, limits": {"n_groups": 1, "tie_word_embeddings": True, "time_step_limit": (0.3, 0.9)},
}


@pytest.mark.parametrize("name", MAMBAS)
def test_mamba2(name, tmp_path, record_property):
    cached = "time_step_limit" not in MAMBAS[name]  # which their single step forgets
    agree(name, "Mamba2", MAMBA2 | MAMBAS[name], tmp_path, record_property, cached=cached)


ENCODERS = {
    "modernbert": {},
    "modernbert biases, untied": {
        "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "decoder_bias": False,
        "norm_eps": 1e-3, "hidden_activation": "silu", "tie_word_embeddings": False, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_modernbert(name, tmp_path, record_property):
    """Logits of all tokens of rows that are longer than the window."""
    tokens_ids = {"cls_token_id": None, "sep_token_id": None} | NO_TOKENS
    knobs = SHAPE | {"local_attention": 8, "num_hidden_layers": 5} | tokens_ids | ENCODERS[name]
    config = transformers.ModernBertConfig(**knobs, attn_implementation="eager")
    model = transformers.ModernBertForMaskedLM(config).eval()
    torch.manual_seed(0)
    randomise(model, 0.3)
    model.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, 24)).astype(np.int32)
    logits = logits_of(model, tokens)
    family, graph, params, net = imported(tmp_path / "theirs")
    worst = float(np.abs(np.asarray(run(graph, params, tokens)) - logits).max())
    record_property(f"worst {name}", worst)
    assert worst <= 1e-4
    again = reloaded(exported(net, params, family.model_type, tmp_path / "ours"), "AutoModelForMaskedLM")
    assert np.abs(logits_of(again, tokens) - logits).max() <= 1e-5


def test_modernbert_decoder(tmp_path, record_property):
    knobs = SHAPE | {"local_attention": 8, "num_hidden_layers": 4, "pad_token_id": 0}
    knobs |= {f"{kind}_token_id": i for i, kind in enumerate(("bos", "cls", "sep"))}
    agree("modernbert decoder", "ModernBertDecoder", knobs, tmp_path, record_property)


T5S = {
    "t5 v1.0": {"feed_forward_proj": "relu"},
    "t5 v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
}


@pytest.mark.parametrize("name", T5S)
def test_t5(name, tmp_path, record_property):
    """Logits along the greedy continuation of sources, and its tokens; the export holds what the import read."""
    tied = "tie_word_embeddings" not in T5S[name]
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=10, d_ff=40, num_layers=2, num_heads=3, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, dropout_rate=0.0, layer_norm_epsilon=1e-4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=None,
        **T5S[name],
    )  # fmt: skip

    def make(config, tied):
        model = transformers.T5ForConditionalGeneration(config).eval()
        if not tied:  # this version of the library ties the head whatever the file says; the checkpoints do not
            model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 24))
        return model

    model = make(config, tied)
    torch.manual_seed(0)
    randomise(model, 0.25)
    directory = tmp_path / "theirs"
    directory.mkdir()
    twins = () if not tied else ("lm_head.weight",)
    weights = {
        path: weight.numpy()
        for path, weight in model.state_dict().items()
        if path not in twins and "embed_tokens" not in path
    }
    safetensors.numpy.save_file(weights, directory / "model.safetensors")
    config.tie_word_embeddings = tied
    directory.joinpath("config.json").write_text(config.to_json_string(use_diff=False))
    sources = torch.tensor(np.random.default_rng(2).integers(1, VOCAB, (2, 17)))
    targets = model.generate(sources, max_new_tokens=NEW, do_sample=False)

    def theirs(model):
        with torch.no_grad():
            return model(input_ids=sources, decoder_input_ids=targets).logits.numpy()

    logits, tokens = theirs(model), targets.numpy().astype(np.int32)
    family, graph, params, net = imported(directory)

    @jax.jit
    def forward(params):
        network = nnx.merge(graph, params)
        context = Context.of(tokens, source=Source.of(sources.numpy().astype(np.int32)))
        return network.logits(network(tokens, context).hidden_BTD)

    found = np.asarray(forward(params))
    worst = float(np.abs(found - logits).max())
    record_property(f"worst {name}", worst)
    assert worst <= 1e-4
    assert tokens.shape == (2, NEW + 1) and np.array_equal(found[:, :-1].argmax(-1), tokens[:, 1:])
    out = exported(net, params, family.model_type, tmp_path / "ours")
    written = {}
    for path in out.glob("*.safetensors"):
        written |= safetensors.numpy.load_file(path)
    assert written.keys() == weights.keys()
    assert all(np.array_equal(written[path], weights[path]) for path in weights)
    again = make(transformers.AutoConfig.from_pretrained(out), tied)
    report = again.load_state_dict({path: torch.tensor(x) for path, x in written.items()}, strict=False)
    assert not report.unexpected_keys
    assert np.abs(theirs(again.eval()) - logits).max() <= 1e-6
