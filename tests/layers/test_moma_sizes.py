"""The parameter counts that MoMa publishes."""

import functools

import jax
import pytest
from flax import nnx

from layers.active import active_parameters
from layers.attention import Attention
from layers.block import Block
from layers.embed import Head
from layers.language_model import LanguageModel
from layers.mixture_of_depths import MixtureOfDepths
from layers.mlp import GatedMLP
from layers.modality_moe import ModalityMoE
from layers.norm import RMSNorm
from layers.stack import Stack

DENSE = [("90M", 8, 512, 8, "210M"), ("435M", 24, 1024, 16, "1.9B"), ("1.4B", 24, 2048, 16, "7.1B")]
DEEP = [("110M", 14, 512, 8, "317M"), ("635M", 40, 1024, 16, "3B"), ("2.3B", 32, 2304, 18, "12B")]


@pytest.mark.parametrize(("dense", "depth", "dim", "heads", "sparse"), DENSE + DEEP)
def test_published_parameter_counts(dense, depth, dim, heads, sparse):
    """Table 1 of arXiv 2407.21770: untied embeddings of 65,536, no biases, experts of width floor(8 D / 3)."""
    width, deep = 8 * dim // 3, dense in [row[0] for row in DEEP]

    def model(ffn):
        block = functools.partial(Block, mixer=functools.partial(Attention, heads=heads), ffn=ffn, norm=RMSNorm)
        pattern = (functools.partial(MixtureOfDepths, block=block), block) if deep else (block,)
        stack = functools.partial(Stack, pattern=pattern, depth=depth)
        head = functools.partial(Head, tied=False)
        return LanguageModel(vocab=65536, dim=dim, stack=stack, norm=RMSNorm, head=head, rngs=nnx.Rngs(params=0))

    def count(ffn, of=lambda network: sum(leaf.size for leaf in jax.tree.leaves(network))):
        return of(jax.eval_shape(lambda: model(ffn)))

    extra = depth * (2 * dim) + dim + (depth // 2 * dim if deep else 0)  # norms, and routers over depth
    rest, expert = 2 * 65536 * dim + 4 * dim * dim * depth, 3 * dim * width * depth
    whole = count(functools.partial(GatedMLP, width=width))
    assert whole == rest + expert + extra
    for groups in ((8,), (4, 4)):
        assert count(functools.partial(ModalityMoE, groups=groups, width=width)) == (
            rest + 8 * expert + extra + depth * dim * 8
        )
    active = count(functools.partial(ModalityMoE, groups=(4, 4), width=width), active_parameters)
    used = whole + depth * dim * 8  # of a token that is kept everywhere
    if deep:  # every second block is passed by one token in four
        used -= 0.75 * depth / 2 * (4 * dim * dim + 3 * dim * width + 2 * dim + 8 * dim)
    assert active == pytest.approx(used, rel=1e-12)
    unit = {"M": 1e6, "B": 1e9}
    for published, experts in ((dense, 1), (sparse, 8)):
        assert rest + experts * expert == pytest.approx(float(published[:-1]) * unit[published[-1]], rel=0.06)
