"""Parameters of one run in the model of another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maxlike.checkpoint import Checkpoints
from maxlike.errors import UserError
from maxlike.warm_start import load_parameters

PARAMS = {
    "embed": jnp.arange(32.0).reshape(8, 4),
    "decoder": {"q": jnp.ones((3, 2)), "k": jnp.full((3,), 2.0), "old_head": jnp.zeros(5)},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    store = Checkpoints().open(directory / "checkpoints")
    ema = jax.tree.map(lambda x: x + 100, PARAMS)
    store.save(4, {"params": PARAMS, "ema": ema, "optimizer": jnp.ones(7), "step": 4}, {})
    store.close()
    return directory


def form(**changes):
    shapes = {"embed": (8, 4), "stack": {"q": (3, 2), "k": (3,)}} | changes
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


MAPPING = {"": "", "stack": "decoder", "stack/k": "decoder/k"}


def test_parameters_are_renamed_and_placed(run):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    wanted = form()
    wanted["embed"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    for source in (run, run / "checkpoints", run / "checkpoints/4"):
        params = load_parameters(source, wanted, MAPPING, ignore={"decoder/old_head"})
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        np.testing.assert_array_equal(params["embed"], PARAMS["embed"])
        np.testing.assert_array_equal(params["stack"]["k"], PARAMS["decoder"]["k"])
        assert params["embed"].sharding == wanted["embed"].sharding
    averaged = load_parameters(run, wanted, MAPPING, tree="ema", ignore={"decoder/old_head"})
    np.testing.assert_array_equal(averaged["stack"]["q"], PARAMS["decoder"]["q"] + 100)


@pytest.mark.parametrize(
    ("wanted", "mapping", "row"),
    [
        (form(), MAPPING, ["extra", "decoder/old_head", "(unused)", "float32[5]"]),
        (form(), {"stack": "decoder"}, ["missing", "embed", "float32[8,", "4]"]),
        (form(head=(5,)), MAPPING, ["missing", "head", "float32[5]"]),
        (form(embed=(9, 4)), MAPPING, ["changed", "embed", "float32[8,", "4]", "float32[9,", "4]"]),
    ],
)
def test_every_parameter_must_be_named_on_both_sides(run, wanted, mapping, row):
    with pytest.raises(UserError, match="name every parameter") as caught:
        load_parameters(run, wanted, mapping)
    assert row in [line.split() for line in str(caught.value).splitlines()]


def test_a_source_cannot_serve_twice(run):
    with pytest.raises(UserError, match="twice"):
        load_parameters(run, form(more={"k": (3,)}), MAPPING | {"more": "decoder"}, ignore={"decoder/old_head"})


def test_a_place_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_parameters(tmp_path, form(), {"": ""}, say=[].append)
