"""Strings in, strings out: buckets, compile counts, stop strings, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.attention import Attention
from layers.block import Block
from layers.embed import Embed
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.rope import RoPE
from layers.stack import Stack
from maxlike.data.tokenizers import Bytes
from maxlike.decode.generate import Generator
from maxlike.decode.sampling import Sampling
from maxlike.errors import UserError
from tests.reference.random import random_module

F = functools.partial
GREEDY = Sampling(temperature=0.0)


class Letters(Bytes):
    """Bytes, of which the model can say few: 64 ids are letters, so that whatever it says is text. No bos."""

    vocab_size = 64

    def __init__(self, eos_id=63, bos_id=None):
        self.eos_id, self.bos_id = eos_id, bos_id

    def encode_batch(self, texts):
        return [np.array([ord(c) - 64 for c in text], np.int32) for text in texts]

    def decode(self, ids):
        return "".join(chr(64 + int(i)) for i in ids if i != self.eos_id)


def network(rngs, vocab: int = 64, positions: int = 0, causal: bool = True):
    block = F(Block, mixer=F(Attention, heads=2, rope=RoPE, causal=causal), ffn=F(GatedMLP, width=24), norm=RMSNorm)
    stack = F(Stack, pattern=(block,), depth=1)
    return LanguageModel(vocab=vocab, dim=16, stack=stack, norm=RMSNorm, embed=F(Embed, positions=positions), rngs=rngs)


@pytest.fixture(scope="module")
def model():
    graph, params, axes = random_module(network)
    return graph, jax.tree.map(jnp.asarray, params), axes


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model[0], Letters(), max_length=128, batch_size=4)


@pytest.fixture(scope="module")
def params(model):
    return model[1]


def like(generator: Generator, tokenizer) -> Generator:
    """Another tokenizer with the same model: the tokenizer is no part of the program."""
    other = Generator(generator.graph, tokenizer, max_length=generator.max_length, batch_size=generator.batch_size)
    other.programs = generator.programs
    return other


def test_one_program_a_bucket(generator, params):
    generator.programs.clear()
    prompts = ["A" * n for n in (1, 2, 7, 31, 32)]
    texts = [generator(params, [prompt], max_new=5, sampling=GREEDY)[0] for prompt in prompts]
    assert len(generator.programs) == 1
    for knobs in ({"temperature": 1.0}, {"top_k": 3, "top_p": 0.5, "seed": 9}):
        generator(params, ["AB"], max_new=30, sampling=Sampling(**knobs), stop=["Q"])
    assert len(generator.programs) == 1
    # Five prompts in batches of at most four: together they say what each says alone.
    assert generator(params, prompts, max_new=5, sampling=GREEDY) == texts
    assert len(generator.programs) == 2
    long = generator(params, ["A" * 33, "A", "B" * 40], max_new=5, sampling=GREEDY)
    assert len(generator.programs) == 3
    assert long[1] == texts[0]


def test_seeds(generator, params):
    prompts = ["HELLO", "HELLO", "HELLO"]
    hot = Sampling(temperature=1.5, seed=3)
    first = generator(params, prompts, max_new=20, sampling=hot)
    assert len(set(first)) == 3  # the second prompt has the next seed
    assert generator(params, prompts, max_new=20, sampling=hot) == first
    assert generator(params, ["HELLO"], max_new=20, sampling=[Sampling(temperature=1.5, seed=4)]) == first[1:2]
    assert generator(params, prompts, max_new=20, sampling=hot, seed=1) != first


def test_stop_strings_and_the_end_token(generator, params):
    free = generator.continuations(params, ["HELLO"], max_new=24, sampling=GREEDY)[0]
    assert free.finish == "length" and len(free.text) == len(free.tokens) == 24
    stop = free.text[3:5]
    place = free.text.index(stop)
    cut = generator.continuations(params, ["HELLO"], max_new=24, sampling=GREEDY, stop=[stop])[0]
    assert cut.finish == "stop" and cut.text == free.text[:place]
    assert len(cut.tokens) == len(cut.logprobs) == place + 2  # through the token that completed it

    end = int(free.tokens[4])
    ends = like(generator, Letters(eos_id=end))
    out = ends.continuations(params, ["HELLO"], max_new=24, sampling=GREEDY)[0]
    count = int(np.flatnonzero(free.tokens == end)[0]) + 1
    assert out.finish == "stop" and len(out.tokens) == count and len(out.text) == count - 1


def test_prompts_begin_as_documents_do(generator, params):
    opened = like(generator, Letters(bos_id=5))(params, ["", "A", "AB"], max_new=8, sampling=GREEDY)
    assert opened == generator(params, ["E", "EA", "EAB"], max_new=8, sampling=GREEDY)
    letters = Letters(bos_id=5)
    letters.opens_prompts = False  # but where there is nothing else
    assert like(generator, letters)(params, ["", "A"], max_new=8, sampling=GREEDY) == generator(
        params, ["E", "A"], max_new=8, sampling=GREEDY
    )


def test_sharded_parameters_give_the_same_text(generator, params, model):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    leaves, tree = jax.tree.flatten(params)
    placed = [
        jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in names))))
        for leaf, names in zip(leaves, model[2], strict=True)
    ]
    assert sum(not leaf.sharding.is_fully_replicated for leaf in placed) > 5
    prompts = ["HELLO", "WORLD", "JAX", "A"]
    expected = generator(params, prompts, max_new=20, sampling=GREEDY)
    with jax.set_mesh(mesh):
        assert generator(jax.tree.unflatten(tree, placed), prompts, max_new=20, sampling=GREEDY) == expected


def test_refusals(generator, params, model):
    for call, words in (
        (lambda: generator(params, [""], max_new=4), "prompt is empty"),
        (lambda: generator(params, ["A" * 120], max_new=9), "129|exceed the 128"),
        (lambda: generator(params, ["A"], max_new=0), "max_new=0"),
        (lambda: generator(params, ["A"], sampling=[GREEDY, GREEDY]), "2 Sampling for 1 prompts"),
        (lambda: Generator(model[0], Letters(), max_length=1), "max_length=1"),
        (lambda: Generator(model[0], Letters(), batch_size=0), "batch_size=0"),
        (lambda: Generator(model[0], Bytes())(params, ["A"], max_new=4), "257 ids and the model 64"),
    ):
        with pytest.raises(UserError, match=words):
            call()
    graph, short, _ = random_module(F(network, positions=100))
    short = jax.tree.map(jnp.asarray, short)
    with pytest.raises(UserError, match="100 learned positions"):
        Generator(graph, Letters(), max_length=128)(short, ["A"], max_new=4)
    encoder, state, _ = random_module(F(network, causal=False))
    with pytest.raises(UserError, match=r"cannot continue a text: .*layer 0.*Attention.causal=False"):
        Generator(encoder, Letters(), max_length=128)(jax.tree.map(jnp.asarray, state), ["A"], max_new=4)


def test_the_longest_bucket_is_the_limit_and_all_may_be_bfloat16():
    graph, params, _ = random_module(F(network, positions=50))
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    generator = Generator(graph, Letters(), max_length=50, cache_dtype="bfloat16")
    out = generator.continuations(half, ["A" * 46], buffers={}, max_new=4, sampling=GREEDY)[0]
    assert len(out.text) == len(out.tokens) == 4 and out.logprobs.dtype == np.float32
