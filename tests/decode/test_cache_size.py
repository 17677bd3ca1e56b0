"""Bytes of the decoding cache equal the formula of each kind of layer."""

import jax.numpy as jnp

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
