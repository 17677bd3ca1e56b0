"""A refusal of ours is told from an error of a library beneath our code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.rope import RoPE
from layers.stack import Stack
from maxlike.check.variant import broken
from maxlike.errors import UserError
from maxlike.hlo import HloModule
from maxlike.refusals import as_user_errors, is_refusal


def refused_while_traced():
    def step(x_BTD):
        return Stack(8, pattern=(), depth=2, rngs=None)(x_BTD)

    jax.jit(lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, None, length=2)).lower(jnp.zeros((1, 2, 8)))


def of_jax_under_a_layer():
    RoPE(4)(jnp.zeros((2, 3, 1, 4)), jnp.zeros((2, 5)))


def of_numpy():
    np.zeros(2) + np.zeros(3)


def of_a_bug_of_ours():
    HloModule.parse("nothing that a compiler wrote")


def test_a_sentence_of_a_layer_becomes_a_user_error():
    with pytest.raises(UserError, match=r"^Stack\.pattern is empty") as caught, as_user_errors():
        refused_while_traced()
    assert is_refusal(caught.value) and is_refusal(caught.value.__cause__)


@pytest.mark.parametrize("raising", [of_jax_under_a_layer, of_numpy, of_a_bug_of_ours])
def test_other_errors_pass_as_they_are(raising):
    with pytest.raises((ValueError, TypeError)) as caught, as_user_errors():
        raising()
    assert not isinstance(caught.value, UserError) and not is_refusal(caught.value)


def test_the_row_of_the_check_names_the_file_of_an_error():
    with pytest.raises((ValueError, TypeError)) as caught:
        of_jax_under_a_layer()
    row = broken("scan", "this against that", caught.value)
    assert row.failed and row.verdict == "DEPARTS" and caught.type.__name__ in row.note and "rope.py" in row.trace
