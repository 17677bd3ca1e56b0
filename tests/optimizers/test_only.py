"""Freezing all parameters but those of some logical axes."""

import jax
import numpy as np
import pytest

from maxlike.errors import UserError
from maxlike.optimizers.adamw import AdamW
from maxlike.optimizers.only import Only
from maxlike.schedules import Clock, Constant

AXES = {"embed": ("vocab", "embed"), "stack": {0: {"up": ("layers", "embed", "mlp"), "norm": ("layers", "norm")}}}
CLOCK = Clock(steps=10, tokens_per_step=1)


def only(*axes):
    return Only(optimizer=AdamW(schedule=Constant(lr=0.1), weight_decay=0.5), axes=axes)


def test_the_rest_gets_no_update_and_no_state():
    params = jax.tree.map(lambda names: np.ones([2] * len(names)), AXES, is_leaf=lambda x: isinstance(x, tuple))
    transform = only("mlp")(AXES, CLOCK)
    updates, state = transform.update(params, transform.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert np.all(np.asarray(updates["stack"][0]["up"]) < 0)
    assert not np.any(updates["embed"]) and not np.any(updates["stack"][0]["norm"])
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (2, 2, 2)}
    assert {path: text == "frozen" for path, text in only("mlp").describe(AXES).items()} == {
        "embed": True,
        "stack/0/up": False,
        "stack/0/norm": True,
    }


def test_axes_that_select_nothing_are_refused():
    with pytest.raises(UserError, match=r"Only\.axes names 'auxiliary' and no parameter"):
        only("auxiliary")(AXES, CLOCK)
    with pytest.raises(UserError, match=r"Only\.axes=\('mpl',\) must name logical axes"):
        only("mpl")
    with pytest.raises(UserError, match=r"Only\.axes"):
        only()
