"""Embedding projections: orthogonal, matrices to Muon, and the same network once they are merged into the tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import merging
from layers.attention import Attention
from layers.block import Block
from layers.context import Context
from layers.embed import Embed, Head
from layers.embedding_projection import ProjectedEmbed, ProjectedHead
from layers.language_model import LanguageModel
from layers.mlp import GatedMLP
from layers.norm import LayerNorm, RMSNorm
from layers.rope import RoPE
from layers.stack import Stack
from maxlike.optimizers import groups

F = functools.partial
UNTIED = F(Head, tied=False)
PROJECTED = F(ProjectedHead, head=UNTIED)
NORM = F(RMSNorm, gain="scalar")
TOKENS_BT = np.random.default_rng(0).integers(0, 37, (2, 9)).astype(np.int32)


def model(embed=ProjectedEmbed, head=PROJECTED):
    block = F(Block, mixer=F(Attention, heads=2, rope=RoPE), ffn=F(GatedMLP, width=16), norm=NORM)
    stack = F(Stack, pattern=(block,), depth=2)
    sizes = {"vocab": 37, "dim": 8, "vocab_multiple": 8}
    return LanguageModel(**sizes, stack=stack, norm=NORM, embed=embed, head=head, rngs=nnx.Rngs(params=0))


@pytest.fixture(scope="module")
def trained():
    """A network with everything that merges: projections that are not orthogonal, gains that are not one."""
    embed = F(ProjectedEmbed, embed=F(Embed, positions=9, scale=2.0))
    graph, shapes = jax.eval_shape(lambda: nnx.split(model(embed=embed)))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * draw.standard_normal(x.shape), jnp.float32), shapes)
    return nnx.merge(graph, params)


@jax.jit
def logits(network):
    hidden_BTD = network(TOKENS_BT, Context.of(TOKENS_BT)).hidden_BTD
    return network.logits(hidden_BTD)[..., :37]


def paths(network):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.split(network)[1]))[0]
    }


def test_a_merged_network_is_a_plain_one_with_the_same_logits(trained):
    merged = merging.merged(trained)
    np.testing.assert_allclose(logits(merged), logits(trained), rtol=1e-4, atol=1e-4)
    assert not any("projection" in path for path in paths(merged))
    assert type(merged.embed) is Embed and type(merged.head) is Head
    assert merged.norm.gain.shape == (8,) and merged.stack.periods[0].mixer_norm.gain.shape == (2, 8)


def test_tables_are_multiplied_in_float64_and_rounded_once(trained):
    merged = merging.merged(trained)
    table, p_in = (np.asarray(x[...], np.float64) for x in (trained.embed.table, trained.embed.projection.kernel))
    p_out, w = (
        np.asarray(x[...], np.float64) for x in (trained.head.projection.kernel, trained.head.head.linear.kernel)
    )
    np.testing.assert_array_equal(merged.embed.table[...], (table @ p_in).astype(np.float32))
    np.testing.assert_array_equal(merged.head.linear.kernel[...], (p_out @ w).astype(np.float32))
    assert trained.embed.table.shape == merged.embed.table.shape  # the network itself is left as it was
    assert "projection" in " ".join(paths(trained))


def test_projections_begin_orthogonal_and_differ():
    rngs = nnx.Rngs(params=0)
    parts = ProjectedEmbed(3, 8, rngs=rngs), PROJECTED(3, 8, rngs=rngs)
    pair = [np.asarray(part.projection.kernel[...], np.float64) for part in parts]
    for matrix in pair:
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-5)
    assert np.abs(pair[0] - pair[1]).max() > 0.1


def abstract(**parts):
    graph, params = jax.eval_shape(lambda: nnx.split(model(**parts)))
    return nnx.merge(graph, params)


def test_either_side_alone():
    inside, outside = abstract(head=UNTIED), abstract(embed=Embed)
    assert {path for path in paths(inside) if "projection" in path} == {"embed/projection/kernel"}
    assert {path for path in paths(outside) if "projection" in path} == {"head/projection/kernel"}


def test_their_flops_are_counted():
    plain, both = abstract(embed=Embed, head=UNTIED), abstract()
    assert both.flops_per_token(9) - plain.flops_per_token(9) == 3 * 2 * (2 * 8 * 8)


def test_they_are_matrices_to_an_optimizer_and_tables_are_not():
    network = abstract()
    for part in (network.embed, network.head):
        assert groups.kind("projection", part.projection.kernel.get_metadata("axes")) == "matrix"
    for table in (network.embed.table, network.head.head.linear.kernel):
        assert groups.kind("table", table.get_metadata("axes")) == "embedding"


def test_decoding_gives_the_same_hidden_states(trained):

    @jax.jit
    def both(network):
        whole_BTD = network(TOKENS_BT, Context.of(TOKENS_BT)).hidden_BTD
        first, cache = network.extend(TOKENS_BT[:, :5], network.init_cache(2, 9, jnp.float32))
        second, _ = network.extend(TOKENS_BT[:, 5:], cache)
        return whole_BTD, jnp.concatenate([first, second], 1)

    np.testing.assert_allclose(*both(trained), rtol=1e-4, atol=1e-4)


def test_a_single_scale_is_a_constant_gain():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    scalar, vector = (RMSNorm(8, gain=gain, rngs=nnx.Rngs(params=0)) for gain in ("scalar", "channel"))
    scalar.gain = scalar.gain.replace(jnp.asarray(0.7))
    vector.gain = vector.gain.replace(jnp.full(8, 0.7))
    np.testing.assert_array_equal(scalar(x), vector(x))
    np.testing.assert_array_equal(scalar.merged()(x), vector(x))
    assert vector.merged() is vector


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"head": Head}, "Head.tied=True"),
        ({"head": F(ProjectedHead, head=Head), "embed": Embed}, "ProjectedHead.head is tied"),
        ({"embed": F(ProjectedEmbed, embed=F(Embed, norm=LayerNorm))}, "Embed.norm = None"),
    ],
)
def test_refusals(parts, named):
    with pytest.raises(ValueError, match=named):
        abstract(**parts)
