"""Bytes of the decoding cache equal the formula of each kind of layer."""

import jax.numpy as jnp
import pytest

from maxlike import config
from maxlike.decode.cache_size import CacheSize, cache_size
from tests import tiny


def test_full_attention_keeps_keys_and_values_of_every_token():
    # tiny: 2 layers, 2 heads of 8; the row counts its tokens in one int32.
    assert cache_size(tiny.load()) == CacheSize(a_token=2 * 2 * 2 * 8 * 4, state=4)
    assert cache_size(tiny.load(), jnp.bfloat16).a_token == 2 * 2 * 2 * 8 * 2
    grouped = tiny.load("attention.Attention.kv_heads = 1")
    assert cache_size(grouped).a_token == 2 * 2 * 1 * 8 * 4


def test_a_window_is_a_state_of_its_own_size():
    size = cache_size(tiny.load("attention.Attention.window = 5"))
    assert size == CacheSize(a_token=0, state=4 + 2 * 5 * (2 * 2 * 8 * 4 + 4))


def test_a_network_that_sees_the_future_has_no_cache():
    assert "Attention.causal=False" in cache_size(tiny.load("attention.Attention.causal = False")).refusal


def test_experts_that_choose_tokens_have_none_without_auxiliary_routers():
    assert "ModalityMoE.auxiliary is None" in cache_size(config.load("families/moma")).refusal
    assert cache_size(config.load("families/moma_routers")).refusal is None


# Per family at 128 dimensions, 4 heads of 32 and 6 layers: bytes a token, bytes of all states. n is the size of a
# number in the compute dtype; recurrent states are always float32.
FAMILIES = {
    "transformer": (lambda n: 6 * 2 * 4 * 32 * n, lambda n: 0),
    "moe": (lambda n: 6 * 2 * 4 * 32 * n, lambda n: 0),
    "moma_routers": (lambda n: 6 * 2 * 4 * 32 * n, lambda n: 0),
    # LRPE doubles the first layer's state.
    "linear_attention": (lambda n: 0, lambda n: (1 * 2 + 5) * 4 * 32 * 32 * 4),
    # 2 layers with a latent of 32 and a rotated key of 16; 4 with 8 heads of state 64 x 32, and the last 3 tokens of x
    # (8 x 32), B and C (64 each) in front of their convolutions.
    "mamba_hybrid": (lambda n: 2 * (32 + 16) * n, lambda n: 4 * (8 * 64 * 32 * 4 + 3 * (8 * 32 + 2 * 64) * n)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_cost_what_their_sizes_say(family):
    experiment, (a_token, state) = config.load(f"families/{family}"), FAMILIES[family]
    for dtype, n in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        assert cache_size(experiment, dtype) == CacheSize(a_token(n), 4 + state(n))  # 4: the row's length
