"""The compiled loop against full forward passes, each row alone, one device and `transformers`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.rope2d import RoPE2D
from layers.stack import Stack
from maxlike.decode.loop import generate
from maxlike.decode.sampling import Sampling, SamplingRows
from tests.reference.random import random_module

F = functools.partial
VOCAB, D, H, G, K, FFN, LAYERS = 259, 32, 4, 2, 8, 40, 2
B, T, NEW = 4, 32, 16
LENGTHS = np.array([1, 9, 20, 32], np.int32)
GREEDY = [Sampling(temperature=0.0)] * B


def network(rngs, positions: int = 0):
    """Full attention, then a window shorter than the prompts: both kinds of cache."""
    kinds = [F(Attention, heads=H, kv_heads=G, head_dim=K, rope=RoPE, window=window) for window in (None, 6)]
    blocks = tuple(F(Block, mixer=mixer, ffn=F(GatedMLP, width=FFN), norm=RMSNorm) for mixer in kinds)
    stack = F(Stack, pattern=blocks, depth=LAYERS)
    embed = F(Embed, positions=positions)
    return LanguageModel(vocab=VOCAB, dim=D, stack=stack, norm=RMSNorm, embed=embed, rngs=rngs)


@pytest.fixture(scope="module")
def model():
    graph, params, axes = random_module(network)
    return graph, jax.tree.map(jnp.asarray, params), axes


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def run(model):
    graph, params, _ = model

    @jax.jit
    def compiled(params, tokens_BT, lengths_B, sampling, limits_B, stop_S):
        key = jax.random.key(0)
        return generate(nnx.merge(graph, params), tokens_BT, lengths_B, sampling, limits_B, stop_S, key, max_new=NEW)

    def call(tokens_BT, requests, *, lengths=LENGTHS, limits=(NEW,) * B, stop=(-1,), params=params):
        arrays = (lengths, SamplingRows.of(requests), np.array(limits, np.int32), np.array(stop, np.int32))
        return jax.tree.map(np.asarray, compiled(params, tokens_BT, *arrays))

    return call


@pytest.fixture(scope="module")
def greedy(run, prompts):
    return run(prompts, GREEDY)


@pytest.fixture(scope="module")
def full_logits(model):
    """Logits of whole rows, without a cache."""
    graph, params, _ = model

    @jax.jit
    def forward(tokens_BT):
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_BT, Context.of(tokens_BT)).hidden_BTD)

    return forward


def joined(prompts, out) -> np.ndarray:
    """Prompt and continuation of each row without the padding between, padded on the right."""
    rows = np.zeros((B, T + NEW), np.int32)
    for b, length in enumerate(LENGTHS):
        rows[b, :length] = prompts[b, :length]
        rows[b, length : length + out.counts_B[b]] = out.tokens_BN[b, : out.counts_B[b]]
    return rows


def test_greedy_is_the_argmax_of_the_full_forward_pass(greedy, prompts, full_logits):
    logits_BTV = np.asarray(full_logits(joined(prompts, greedy)))
    for b, length in enumerate(LENGTHS):
        logits_NV = logits_BTV[b, length - 1 : length - 1 + NEW]
        np.testing.assert_array_equal(greedy.tokens_BN[b], logits_NV.argmax(-1))
        logprobs_N = jax.nn.log_softmax(logits_NV)[np.arange(NEW), greedy.tokens_BN[b]]
        np.testing.assert_allclose(greedy.logprobs_BN[b], logprobs_N, atol=1e-4)
    assert (greedy.counts_B == NEW).all() and not greedy.stopped_B.any()
    assert (greedy.sampling_logprobs_BN == 0).all()
    assert len(np.unique(greedy.tokens_BN)) > NEW  # not a model that says one thing


def test_a_row_is_the_same_in_any_batch_and_slot(run, prompts):
    requests = [Sampling(temperature=0.9, top_p=0.95, seed=50 + b) for b in range(B)]
    together = run(prompts, requests)
    order = [2, 0, 3, 1]
    shuffled = run(prompts[order], [requests[b] for b in order], lengths=LENGTHS[order])
    np.testing.assert_array_equal(shuffled.tokens_BN, together.tokens_BN[order])
    for b in range(B):  # alone: the other rows are finished from the start
        limits = [NEW if row == b else 0 for row in range(B)]
        alone = run(prompts, requests, limits=limits)
        np.testing.assert_array_equal(alone.tokens_BN[b], together.tokens_BN[b])
        assert alone.counts_B.sum() == NEW
    other_seeds = run(prompts, [Sampling(temperature=0.9, top_p=0.95, seed=b) for b in range(B)])
    assert (other_seeds.tokens_BN != together.tokens_BN).any()


def test_padding_of_the_prompt_is_not_read(run, prompts, greedy):
    junk = np.where(np.arange(T) < LENGTHS[:, None], prompts, 7)
    np.testing.assert_array_equal(run(junk, GREEDY).tokens_BN, greedy.tokens_BN)


@pytest.mark.parametrize("prompt", ["prefix", "blank"])
def test_a_prompt_that_is_a_prefix_is_read_whole(prompt):
    """Greedy tokens are those of whole rows in which prompt tokens see each other; a blank's opening token is the
    first of what fills it."""
    lengths, new, rope = np.array([5, 1, 3]), 4, RoPE2D if prompt == "blank" else RoPE
    block = F(Block, mixer=F(Attention, heads=2, rope=rope), ffn=F(GatedMLP, width=24), norm=RMSNorm)
    make = F(LanguageModel, vocab=50, dim=16, stack=F(Stack, pattern=(block,), depth=2), norm=RMSNorm, prompt=prompt)
    graph, params, _ = random_module(lambda rngs: make(rngs=rngs))
    model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    tokens = np.random.default_rng(5).integers(0, 50, (3, 5)).astype(np.int32)
    sampling = SamplingRows.of([Sampling(temperature=0.0)] * 3)
    stop, limits = np.array([-1]), np.full(3, new)
    key = jax.random.key(0)

    @jax.jit
    def run(params):
        return generate(nnx.merge(graph, params), tokens, lengths, sampling, limits, stop, key, max_new=new)

    out = run(params)
    for b, length in enumerate(lengths):
        row = np.concatenate([tokens[b, :length], out.tokens_BN[b]])[None]
        index, prefix = np.arange(row.shape[1])[None], max(length - (prompt == "blank"), 1)
        ctx = Context.of(jnp.asarray(row), prefix_BT=jnp.asarray(index < prefix))
        if prompt == "blank":
            blocks = np.maximum(index - prefix + 1, 0)
            ctx = ctx.replace(blocks_BT=jnp.asarray(blocks), anchors_BT=jnp.asarray(index - blocks))
        logits = model.logits(model(jnp.asarray(row), ctx).hidden_BTD)[0]
        logprobs = jax.nn.log_softmax(logits[length - 1 : -1])
        np.testing.assert_array_equal(out.tokens_BN[b], logprobs.argmax(-1))
        np.testing.assert_allclose(out.logprobs_BN[b], logprobs.max(-1), atol=1e-4)


def test_stop_tokens_end_a_row_and_only_that_row(run, prompts, greedy):
    stop = greedy.tokens_BN[1, 4]
    out = run(prompts, GREEDY, stop=(stop,))
    for b in range(B):
        hits = np.flatnonzero(greedy.tokens_BN[b] == stop)
        count = hits[0] + 1 if len(hits) else NEW
        assert out.counts_B[b] == count and out.stopped_B[b] == bool(len(hits))
        np.testing.assert_array_equal(out.tokens_BN[b, :count], greedy.tokens_BN[b, :count])
        assert (out.tokens_BN[b, count:] == -1).all() and (out.logprobs_BN[b, count:] == 0).all()
    assert out.stopped_B[1] and not out.stopped_B.all()


def test_limits_are_data(run, prompts, greedy):
    out = run(prompts, GREEDY, limits=(3, NEW, 0, 100))
    assert list(out.counts_B) == [3, NEW, 0, NEW]
    np.testing.assert_array_equal(out.tokens_BN[0, :3], greedy.tokens_BN[0, :3])
    np.testing.assert_array_equal(out.tokens_BN[3], greedy.tokens_BN[3])


def test_penalties_see_prompt_and_continuation(run, prompts, greedy, full_logits):
    out = run(prompts, [Sampling(temperature=0.0, repetition_penalty=3.0)] * B)
    rows = joined(prompts, out)
    logits_BTV = np.asarray(full_logits(rows))
    for b, length in enumerate(LENGTHS):
        for n in range(NEW):
            logits_V = logits_BTV[b, length - 1 + n].copy()
            seen = np.unique(rows[b, : length + n])
            logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / 3, logits_V[seen] * 3)
            assert out.tokens_BN[b, n] == logits_V.argmax()
    never_again = run(prompts, [Sampling(temperature=0.0, presence_penalty=1e9)] * B)
    assert all(len(np.unique(row)) == NEW for row in never_again.tokens_BN)
    assert any(len(np.unique(row)) < NEW for row in greedy.tokens_BN)


def test_sampling_logprobs_are_those_of_the_filtered_distribution(run, prompts, greedy):
    one_left = run(prompts, [Sampling(top_k=1)] * B)
    np.testing.assert_array_equal(one_left.tokens_BN, greedy.tokens_BN)
    np.testing.assert_allclose(one_left.sampling_logprobs_BN, 0.0, atol=1e-6)
    plain = run(prompts, [Sampling(seed=b) for b in range(B)])
    np.testing.assert_allclose(plain.sampling_logprobs_BN, plain.logprobs_BN, atol=1e-4)


def test_llama_of_transformers_token_for_token():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=FFN, num_attention_heads=H, num_key_value_heads=G,
        num_hidden_layers=LAYERS, head_dim=K, max_position_embeddings=128, rms_norm_eps=1e-6, initializer_range=0.3,
        tie_word_embeddings=False, attn_implementation="eager", bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    params = from_llama({name: weight.numpy() for name, weight in theirs.state_dict().items()})
    block = F(
        Block,
        mixer=F(Attention, heads=H, kv_heads=G, head_dim=K, rope=RoPE),
        ffn=F(GatedMLP, width=FFN),
        norm=RMSNorm,
    )
    stack = F(Stack, pattern=(block,), depth=LAYERS)
    graph, _, _ = random_module(
        lambda rngs: LanguageModel(vocab=VOCAB, dim=D, stack=stack, norm=RMSNorm, head=F(Head, tied=False), rngs=rngs)
    )
    lengths = np.array([5, 17, 32], np.int32)
    tokens = np.random.default_rng(1).integers(1, VOCAB, (3, 32)).astype(np.int32)
    left = np.stack([np.roll(row * (np.arange(32) < n), 32 - n) for row, n in zip(tokens, lengths)])
    mask = np.stack([np.arange(32) >= 32 - n for n in lengths])
    expected = theirs.generate(
        torch.from_numpy(left), attention_mask=torch.from_numpy(mask).long(), do_sample=False, max_new_tokens=64
    ).numpy()[:, 32:]

    @jax.jit
    def ours(params):
        rows = SamplingRows.of([Sampling(temperature=0.0)] * 3)
        room, stop = np.full(3, 64, np.int32), np.array([-1], np.int32)
        model = nnx.merge(graph, params)
        return generate(model, tokens, lengths, rows, room, stop, jax.random.key(0), max_new=64).tokens_BN

    np.testing.assert_array_equal(ours(jax.tree.map(jnp.asarray, params)), expected)


def from_llama(weights: dict[str, np.ndarray]) -> dict:
    """Llama's names to ours: a torch weight is [out, in], ours [in, out] with heads apart; layers are stacked."""

    def stacked(name: str, *shape: int) -> np.ndarray:
        layers = [weights[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        return np.stack([w.T.reshape(shape) for w in layers])

    attention = {"query": ("q", (D, H, K)), "key": ("k", (D, G, K)), "value": ("v", (D, G, K)), "out": ("o", (H, K, D))}
    block = {
        "mixer": {our: {"kernel": stacked(f"self_attn.{name}_proj", *s)} for our, (name, s) in attention.items()},
        "mixer_norm": {"gain": stacked("input_layernorm", D)},
        "ffn_norm": {"gain": stacked("post_attention_layernorm", D)},
        "ffn": {
            "gate": {"kernel": stacked("mlp.gate_proj", D, FFN)},
            "up": {"kernel": stacked("mlp.up_proj", D, FFN)},
            "down": {"kernel": stacked("mlp.down_proj", FFN, D)},
        },
    }
    return {
        "embed": {"table": weights["model.embed_tokens.weight"]},
        "norm": {"gain": weights["model.norm.weight"]},
        "stack": {"periods": {0: block}},
        "head": {"linear": {"kernel": weights["lm_head.weight"].T}},
    }
