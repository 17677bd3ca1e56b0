"""The T5 layout: equal to `transformers`, packed rows equal to separate ones, decoding equal to the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context, Source
from layers.embed import Embed, Head
from layers.encoder_decoder import EncoderDecoder
from layers.language_model import LanguageModel
from layers.mlp import MLP, GatedMLP
from layers.norm import RMSNorm
from layers.relative_attention import CrossAttention, RelativeAttention, RelativeBias
from layers.stack import Stack
from maxlike.decode.loop import generate
from maxlike.decode.sampling import Sampling, SamplingRows
from tests.reference.random import random_module

F = functools.partial
VOCAB, D, FFN, H, K, LAYERS = 48, 24, 40, 3, 10, 2
SOURCES = np.random.default_rng(0).integers(1, VOCAB, (2, 17))
TARGETS = np.random.default_rng(1).integers(1, VOCAB, (2, 21))


RELU, SCALED = F(MLP, width=FFN, activation="relu"), F(Head, scale=D**-0.5)


def make(rngs, ffn=RELU, head=SCALED, scan=None):
    """The v1.0 layout by default: relu without a gate, a tied head scaled by D^-0.5."""
    itself = F(RelativeAttention, heads=H, head_dim=K)
    reading = F(Block, mixer=F(itself, causal=False), ffn=ffn, norm=RMSNorm)
    writing = F(Block, mixer=itself, ffn=None, norm=RMSNorm)
    looking = F(Block, mixer=F(CrossAttention, heads=H, head_dim=K, scale=1.0), ffn=ffn, norm=RMSNorm)
    return EncoderDecoder(
        vocab=VOCAB,
        dim=D,
        encoder=F(Stack, pattern=(reading,), depth=LAYERS, scan=scan),
        decoder=F(Stack, pattern=(writing, looking), depth=2 * LAYERS, scan=scan),
        norm=RMSNorm,
        embed=F(Embed, std=1.0),
        head=head,
        bias=F(RelativeBias, heads=H, buckets=8, max_distance=12),
        rngs=rngs,
    )


def build(**knobs):
    return nnx.merge(*random_module(lambda rngs: make(rngs, **knobs))[:2])


def weights_of(model, std: float) -> dict[str, np.ndarray]:
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * std + (1.0 if "layer_norm" in name else 0.0))
    return {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


def our_params(weights: dict[str, np.ndarray], gated: bool, tied: bool) -> dict:
    """T5's names to ours: weights are [out, in] there, [in, out] with heads apart here; layers are stacked."""

    def stacked(side, part, shape=None):
        layers = [weights[f"{side}.block.{i}.layer.{part}.weight"] for i in range(LAYERS)]
        return np.stack([w if shape is None else w.T.reshape(shape) for w in layers])

    def attention(side, part):
        names = {"query": "q", "key": "k", "value": "v"}
        heads = {ours: {"kernel": stacked(side, f"{part}.{theirs}", (D, H, K))} for ours, theirs in names.items()}
        return heads | {"out": {"kernel": stacked(side, f"{part}.o", (H, K, D))}}

    def feed_forward(side, at):
        part = f"{at}.DenseReluDense"
        into = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
        shaped = {ours: {"kernel": stacked(side, f"{part}.{theirs}", (D, FFN))} for ours, theirs in into.items()}
        return shaped | {"down": {"kernel": stacked(side, f"{part}.wo", (FFN, D))}}

    def gain(side, at):
        return {"gain": stacked(side, f"{at}.layer_norm")}

    reading = {"mixer": attention("encoder", "0.SelfAttention"), "mixer_norm": gain("encoder", 0)}
    reading |= {"ffn": feed_forward("encoder", 1), "ffn_norm": gain("encoder", 1)}
    writing = {"mixer": attention("decoder", "0.SelfAttention"), "mixer_norm": gain("decoder", 0)}
    looking = {"mixer": attention("decoder", "1.EncDecAttention"), "mixer_norm": gain("decoder", 1)}
    looking |= {"ffn": feed_forward("decoder", 2), "ffn_norm": gain("decoder", 2)}
    first = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    params = {
        "embed": {"table": weights["shared.weight"]},
        "encoder": {"periods": {0: reading}},
        "decoder": {"periods": {0: writing, 1: looking}},
        "encoder_norm": {"gain": weights["encoder.final_layer_norm.weight"]},
        "decoder_norm": {"gain": weights["decoder.final_layer_norm.weight"]},
        "encoder_bias": {"table": weights[f"encoder.{first}"]},
        "decoder_bias": {"table": weights[f"decoder.{first}"]},
    }
    return params if tied else params | {"head": {"linear": {"kernel": weights["lm_head.weight"].T}}}


VERSIONS = {
    "v1.0": ({"feed_forward_proj": "relu"}, {}),
    "v1.1": (
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"ffn": F(GatedMLP, width=FFN, activation="gelu_tanh"), "head": F(Head, tied=False)},
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_greedy_decoding_are_those_of_transformers(version, record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs, ours = VERSIONS[version]
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=D, d_kv=K, d_ff=FFN, num_layers=LAYERS, num_heads=H, pad_token_id=0,
        eos_token_id=None, relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
        decoder_start_token_id=0, **theirs,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    tied = version == "v1.0"
    if not tied:  # this version of the library ties the head whatever the configuration says; the checkpoints do not
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, D))
    params = our_params(weights_of(model, 0.3 if tied else 0.25), gated=not tied, tied=tied)
    graph, state = jax.eval_shape(lambda: nnx.split(make(nnx.Rngs(params=0), **ours)))
    expected = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert jax.tree.map(jnp.shape, params) == expected
    params = jax.tree.map(jnp.asarray, params)
    source, targets_BT = Source.of(jnp.asarray(SOURCES)), jnp.asarray(TARGETS)

    @jax.jit
    def run(params):
        network = nnx.merge(graph, params)
        logits_BTV = network.logits(network(targets_BT, Context.of(targets_BT, source=source)).hidden_BTD)
        start, sampling = jnp.zeros((2, 1), jnp.int32), SamplingRows.of([Sampling(temperature=0.0)] * 2)
        limits_B, stop_S = jnp.full(2, 24), jnp.asarray([-1])
        made = generate(
            network.given(source), start, jnp.ones(2, jnp.int32), sampling, limits_B, stop_S, jax.random.key(0),
            max_new=24,
        )  # fmt: skip
        return logits_BTV, made.tokens_BN

    logits_BTV, tokens_BN = run(params)
    with torch.no_grad():
        sources, targets = torch.from_numpy(SOURCES), torch.from_numpy(TARGETS)
        wanted = model(input_ids=sources, decoder_input_ids=targets).logits.numpy()
        greedy = model.generate(sources, max_new_tokens=24, do_sample=False).numpy()
    record_property(f"worst T5ForConditionalGeneration {version}", float(np.abs(logits_BTV - wanted).max()))
    np.testing.assert_allclose(logits_BTV, wanted, atol=1e-4)
    np.testing.assert_array_equal(tokens_BN, greedy[:, 1:])
    assert len(np.unique(greedy)) > 2, "a constant continuation would prove little"


def test_packed_pairs_equal_separate_ones():
    """Two pairs in one row on both sides, padding behind; cross-attention and both biases know the segments."""
    model = build()
    run = jax.jit(lambda tokens, ctx: model(tokens, ctx).hidden_BTD)
    n, m = (7, 10), (9, 5)  # source and target lengths of the pairs

    def pad(x, length):
        return jnp.pad(jnp.asarray(x), ((0, 0), (0, length - x.shape[1])))

    sources = [SOURCES[i : i + 1, : n[i]] for i in range(2)]
    targets = [TARGETS[i : i + 1, : m[i]] for i in range(2)]
    ids = [pad(np.concatenate([np.full((1, k), i + 1) for i, k in enumerate(lengths)], 1), 20) for lengths in (n, m)]
    places = [pad(np.concatenate([np.arange(k)[None] for k in lengths], 1), 20) for lengths in (n, m)]
    source = Source(pad(np.concatenate(sources, 1), 20), places[0], ids[0])
    packed = run(pad(np.concatenate(targets, 1), 20), Context(places[1], ids[1], source=source))
    for i, start in enumerate((0, m[0])):
        alone = Source(pad(sources[i], 20), pad(np.arange(n[i])[None], 20), pad(np.full((1, n[i]), 1), 20))
        ctx = Context(pad(np.arange(m[i])[None], 20), pad(np.full((1, m[i]), 1), 20), source=alone)
        got = run(pad(targets[i], 20), ctx)[:, : m[i]]
        np.testing.assert_allclose(packed[:, start : start + m[i]], got, atol=1e-5)


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_chunks_of_unequal_rows_decode_as_the_whole(scan):
    model = build(scan=scan)
    source = Source.of(jnp.asarray(SOURCES), jnp.asarray([17, 6]))  # the second row's source ends in padding
    targets_BT = jnp.asarray(TARGETS[:, :8])
    dirty = Source(jnp.where(source.segments_BS > 0, source.tokens_BS, 3), source.positions_BS, source.segments_BS)
    whole = jax.jit(lambda source: model(targets_BT, Context.of(targets_BT, source=source)).hidden_BTD)(source)
    given = model.given(dirty)
    cache = given.init_cache(2, 8, jnp.float32)
    extend = jax.jit(lambda tokens, cache, lengths: given.extend(tokens, cache, lengths))
    at = np.zeros(2, int)
    for lengths in ((3, 1), (0, 3), (3, 3), (2, 1)):
        tokens = np.zeros((2, 3), int)
        for row, n in enumerate(lengths):
            tokens[row, :n] = targets_BT[row, at[row] : at[row] + n]
        hidden, cache = extend(jnp.asarray(tokens), cache, jnp.asarray(lengths))
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(hidden[row, :n], whole[row, at[row] : at[row] + n], atol=1e-5)
        at += np.asarray(lengths)
    np.testing.assert_array_equal(at, 8)


def test_flops_are_both_stacks_and_the_head():
    model = build()
    attention, ffn = 2 * 4 * D * H * K, 2 * 2 * D * FFN  # four projections, two products
    mixing = 4 * H * K * 32  # scores and mixing over a whole row of 32
    encoder = attention + mixing + ffn
    decoder = attention + mixing / 2 + attention + mixing + ffn
    assert model.flops_per_token(32) == 3 * (LAYERS * (encoder + decoder) + 2 * D * VOCAB)


def test_refusals():
    tokens = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"Context.source"):
        jax.eval_shape(lambda: build()(tokens, Context.of(tokens)))
    with pytest.raises(ValueError, match="does not fit the 2 rows"):
        jax.eval_shape(lambda: build().given(Source.of(jnp.asarray(SOURCES))).init_cache(3, 4, jnp.float32))
    with pytest.raises(ValueError, match=r"EncoderDecoder.given\(source\)"):
        build().init_cache(2, 4, jnp.float32)
    deaf = F(Stack, pattern=(F(Block, mixer=F(Attention, heads=2), ffn=None, norm=RMSNorm),), depth=1)
    network = F(EncoderDecoder, vocab=9, dim=D, encoder=deaf, decoder=deaf, norm=RMSNorm)
    with pytest.raises(ValueError, match=r"EncoderDecoder.bias is read by no layer of the encoder"):
        jax.eval_shape(lambda: network(bias=F(RelativeBias, heads=2), rngs=nnx.Rngs(0)))
    model = F(LanguageModel, vocab=9, dim=D, stack=deaf, norm=RMSNorm)
    with pytest.raises(ValueError, match=r"LanguageModel does not read Context.source"):
        jax.eval_shape(lambda: model(rngs=nnx.Rngs(0))(tokens, Context.of(tokens, source=Source.of(tokens))))
    with pytest.raises(ValueError, match=r"EncoderDecoder.vocab=0"):
        EncoderDecoder(vocab=0, dim=D, encoder=F(Stack), decoder=F(Stack), norm=RMSNorm, rngs=nnx.Rngs(params=0))
