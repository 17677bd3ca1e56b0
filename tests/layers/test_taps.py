"""Taps cost nothing, see every layer, and every kernel works on what they leave of queries, keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers import kernels, taps
from layers.attention import Attention
from layers.attention_gate import AttentionGate
from layers.block import Block
from layers.context import Context
from layers.dual_chunk import DualChunk
from layers.language_model import LanguageModel
from layers.mla import MLA
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.relative_attention import RelativeAttention, RelativeBias
from layers.rope import RoPE
from layers.stack import Stack, lay_bare
from tests.reference.random import random_module

F = functools.partial
B, T, D, H, K = 2, 12, 16, 2, 8
ATTENTION = F(Attention, heads=H, rope=RoPE)
MLA_KNOBS = {"heads": H, "kv_rank": 8, "nope_dim": 4, "rope_dim": 4, "value_dim": 6, "rope": RoPE}
MIXERS = {
    "blocked": (ATTENTION, ("attention", "blocked")),
    "chunked": (F(ATTENTION, window=5), ("attention", "chunked")),
    "xla": (F(ATTENTION, gate=F(AttentionGate, granularity="headwise")), ("attention", "xla")),
    "dual_chunk": (F(DualChunk, heads=H, rope=RoPE, chunk=4, local=2, trained_length=8), ("dual_chunk", "whole")),
    "mla": (F(MLA, **MLA_KNOBS), ("attention", "blocked")),
    "relative": (F(RelativeAttention, heads=H, bias=F(RelativeBias, heads=H, bidirectional=False)), None),
}


def test_taps_leave_no_trace_in_the_program():
    block = F(Block, mixer=F(ATTENTION, gate=AttentionGate), ffn=F(GatedMLP, width=8), norm=RMSNorm)
    stack = F(Stack, pattern=(block,), depth=2, scan=True)
    graph, params, _ = random_module(lambda rngs: LanguageModel(vocab=9, dim=D, stack=stack, norm=RMSNorm, rngs=rngs))
    tokens_BT, seen = jnp.ones((B, T), jnp.int32), []

    def run(params):
        network = nnx.merge(graph, params)
        return network.logits(network(tokens_BT, Context.of(tokens_BT)).hidden_BTD)

    def observe(x, owner):
        seen.append(owner)
        return x

    def observed(params):
        with taps.opened(dict.fromkeys(taps.NAMES, observe)):
            return run(params)

    # jax.nn's functions are traced once and then kept, under addresses that the text would show.
    programs = [jax.jit(f).lower(params).as_text().replace("jit_observed", "jit_run") for f in (run, observed)]
    assert programs[0] == programs[1]
    # The embedding and one period: its block, four projections of attention, its gate and three of the feed-forward.
    assert len(seen) == 2 + 4 + 1 + 3 + len(("queries", "keys", "values", "attention_output", "gated_output", "gate"))


def test_a_bare_network_is_the_same_and_gives_what_taps_see():
    block = F(Block, mixer=ATTENTION, ffn=F(GatedMLP, width=8), norm=RMSNorm)
    knobs = {"prefix": (block,), "pattern": (block, block), "depth": 4, "scan": True, "remat": "full"}
    stack = F(Stack, **knobs)
    graph, params, _ = random_module(lambda rngs: LanguageModel(vocab=9, dim=D, stack=stack, norm=RMSNorm, rngs=rngs))
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 9, (B, T)))

    @jax.jit
    def run(params):
        network, seen, kernels_of = nnx.merge(graph, params), [], []

        def residual(x, owner):
            seen.append(x)
            return x

        def linear_input(x, owner):
            kernels_of.append(owner.kernel[...])
            return x

        with taps.opened({"residual": residual, "linear_input": linear_input}):
            hidden = lay_bare(network)(tokens_BT, Context.of(tokens_BT)).hidden_BTD
        ctx = Context.of(tokens_BT)
        return network(tokens_BT, ctx).hidden_BTD, hidden, seen, network.norm(seen[-1]), kernels_of

    scanned, bare, seen, normed, kernels_of = run(params)
    np.testing.assert_allclose(bare, scanned, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normed, bare, rtol=1e-5)
    assert len(seen) == 1 + 5
    np.testing.assert_array_equal(seen[0], params["embed"]["table"][tokens_BT])
    # The owner has the parameters of its own layer: the second block of the second period is the fourth after a prefix.
    queries = [kernel for kernel in kernels_of if kernel.shape == (D, H, K)][::3]
    np.testing.assert_array_equal(queries[4], params["stack"]["periods"][1]["mixer"]["query"]["kernel"][1])


def _mix(turn: np.ndarray, x: jax.Array, owner: object) -> jax.Array:
    return x @ turn[: x.shape[-1], : x.shape[-1]]


@pytest.mark.parametrize("name", MIXERS)
def test_every_kernel_takes_what_taps_leave(name):
    mixer, chosen = MIXERS[name]
    graph, params, _ = random_module(lambda rngs: mixer(D, rngs=rngs))
    x_BTD = jax.random.normal(jax.random.key(0), (B, T, D))
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((K, K)))[0].astype(np.float32)
    turned, doubled, none = F(_mix, turn), lambda x, owner: 2 * x, lambda x, owner: 0 * x

    @jax.jit
    def run(params):
        layer = nnx.merge(graph, params)

        def call(**functions):
            with taps.opened(functions):
                return layer(x_BTD, Context.of(x_BTD[..., 0]))[0]

        def decode(**functions):
            cache, out = layer.init_cache(B, T, jnp.float32), []
            for start, stop in ((0, T - 2), (T - 2, T)):
                positions_BT = jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))
                ctx = Context(positions_BT, None, lengths_B=jnp.full(B, stop - start))
                with taps.opened(functions):
                    y_BTD, cache = layer.extend(x_BTD[:, start:stop], cache, ctx)
                out.append(y_BTD)
            return jnp.concatenate(out, 1)

        changed = {"queries": turned, "values": doubled}
        return {
            "plain": call(),
            "turned": call(queries=turned, keys=turned),
            "changed": call(**changed),
            "decoded": decode(**changed),
            "no queries": call(queries=none),
            "no keys": call(keys=none),
            "doubled": call(values=doubled),
        }

    if chosen is None:
        y = run(params)
    else:
        with kernels.choose(*chosen):
            y = run(params)
    close = F(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    close(y["turned"], y["plain"])  # scores of turned queries and keys are the same
    close(y["doubled"], 2 * y["plain"])
    close(y["no queries"], y["no keys"])
    close(y["decoded"], y["changed"])
    assert np.max(np.abs(y["changed"] - 2 * y["plain"])) > 1e-2
    assert np.max(np.abs(y["no keys"] - y["plain"])) > 1e-2


def test_contexts_nest_and_mistakes_are_named():
    add, double = (lambda x, owner: x + 1), (lambda x, owner: 2 * x)
    with taps.opened({"gate": add}), taps.opened({"gate": double}):
        assert taps.tap("gate", jnp.ones(())) == 4.0
        assert taps.is_open("keys", "gate") and not taps.is_open("keys")
    assert taps.tap("gate", jnp.ones(())) == 1.0
    with pytest.raises(ValueError, match="no tap 'querys': use one of residual"), taps.opened({"querys": add}):
        pass
    with (
        taps.opened({"gate": lambda x, owner: x[0]}),
        pytest.raises(
            ValueError, match=r"the tap 'gate' of Context got float32\[3\] and its function returned float32"
        ),
    ):
        taps.tap("gate", jnp.ones(3), Context.of(jnp.ones((1, 1))))
