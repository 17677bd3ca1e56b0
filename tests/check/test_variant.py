"""A refusal of ours is told from an error of jax beneath our code."""

import jax.numpy as jnp

from layers.rope import RoPE
from layers.stack import Stack
from maxlike.check.variant import broken, refused_by_us


def raised(function) -> ValueError:
    try:
        function()
    except (ValueError, TypeError) as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_sentence_of_a_layer_is_a_refusal():
    assert refused_by_us(raised(lambda: Stack(8, pattern=(), depth=2, rngs=None)))


def test_an_error_of_jax_is_none_although_our_line_is_the_last_of_its_traceback():
    error = raised(lambda: RoPE(4)(jnp.zeros((2, 3, 1, 4)), jnp.zeros((2, 5))))
    assert not refused_by_us(error)
    row = broken("scan", "this against that", error)
    assert row.failed and row.verdict == "DEPARTS" and type(error).__name__ in row.note and "rope.py" in row.trace
