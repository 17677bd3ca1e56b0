"""The resolver refuses what it does not know, and places parameters and moments by one rule."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from maxlike.errors import UserError
from maxlike.sharding import Mesh, state_shardings

RULES = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": ("tensor", "fsdp"),
    "norm": None,
    "batch": ("data", "fsdp"),
    "length": None,
}


def layout(shape=None, rules=RULES):
    return Mesh(shape=shape or {"fsdp": 4, "tensor": 2}, rules=rules).open()


def test_spec_maps_axes_and_drops_axes_of_size_one():
    both = layout()
    assert both.spec(("embed", "mlp"), (8, 6), "w") == P("fsdp", "tensor")
    assert both.spec(("batch", "length"), (8, 5), "batch") == P("fsdp", None)
    assert both.spec((None, "norm"), (3, 5), "g") == P(None, None)
    single = layout({"data": 1, "tensor": 1})
    assert single.spec(("embed", "mlp"), (7, 5), "w") == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("embd", "mlp"), (8, 8), "no rule says where the logical axis 'embd' of w lies: did you mean 'embed'"),
        (("mlp", "heads"), (8, 8), "'mlp' and 'heads' both lie on the mesh axis 'tensor'"),
        (("embed", "mlp"), (6, 8), "w: its dimension 'embed' of size 6 does not divide over fsdp=4"),
        (("embed",), (8, 8), "carries 1 logical axes"),
    ],
)
def test_spec_refuses(axes, shape, message):
    with pytest.raises(UserError, match=message):
        layout().spec(axes, shape, "w")


@pytest.mark.parametrize(
    ("shape", "rules", "message"),
    [
        ({"fsdb": 2}, {}, "did you mean 'fsdp'"),
        ({"fsdp": 0}, {}, "at least 1"),
        ({"fsdp": -1, "data": -1}, {}, "only one may be -1"),
        ({"fsdp": 2}, {"embod": None}, "did you mean 'embed'"),
        ({"fsdp": 2}, {"embed": "fsdpp"}, "did you mean 'fsdp'"),
    ],
)
def test_mesh_refuses(shape, rules, message):
    with pytest.raises(UserError, match=message):
        Mesh(shape=shape, rules=rules)


def test_mesh_larger_than_the_devices():
    with pytest.raises(UserError, match=r"needs 16 devices and there are 8.*mesh/single"):
        layout({"fsdp": 16})


def test_open_size_takes_the_remaining_devices():
    assert dict(layout({"fsdp": -1, "tensor": 2}).mesh.shape) == {"fsdp": 4, "tensor": 2}
    with pytest.raises(UserError, match="covers 6 of 8"):
        layout({"fsdp": -1, "tensor": 3})


def sliced(shape, per_slice, **knobs):
    """Slice of each of some made-up devices, in the arrangement of a mesh."""
    kinds = {"process_index": 0, "platform": "gpu", "device_kind": "made up"}
    numbered = [i for i, size in enumerate(per_slice) for _ in range(size)]
    devices = [types.SimpleNamespace(id=i, slice_index=s, **kinds) for i, s in enumerate(numbered)]
    mesh = Mesh(shape=shape, rules=RULES, **knobs)
    return np.vectorize(lambda device: device.slice_index)(mesh.arrange(mesh.sizes(len(devices)), devices[::-1]))


def test_slices_lie_along_the_outer_axes():
    np.testing.assert_array_equal(sliced({"data": 2, "fsdp": -1}, [4, 4]), [[0] * 4, [1] * 4])
    # the axis that crosses is cut between slices first and inside them after that
    np.testing.assert_array_equal(sliced({"tensor": 2, "fsdp": 4}, [4, 4]), [[0, 0, 1, 1], [0, 0, 1, 1]])
    both = sliced({"data": 2, "fsdp": 4, "tensor": 2}, [4] * 4)
    np.testing.assert_array_equal(both[..., 0], both[..., 1])
    np.testing.assert_array_equal(both[..., 0], [[0, 0, 1, 1], [2, 2, 3, 3]])
    np.testing.assert_array_equal(sliced({"tensor": 2, "fsdp": 2}, [2, 2], across_slices=("tensor",)), [[0, 0], [1, 1]])


def test_slices_that_no_outer_axis_divides_over_are_refused():
    with pytest.raises(UserError, match=r"do not divide over 2 slices.*multiple of 2"):
        sliced({"tensor": -1}, [4, 4])
    with pytest.raises(UserError, match=r"different numbers of devices, \{0: 6, 1: 2\}"):
        sliced({"data": 8}, [6, 2])
    with pytest.raises(UserError, match=r"across_slices names 'dta'.*did you mean 'data'"):
        Mesh(shape={"data": 8}, rules=RULES, across_slices=("dta",))


PARAMS = {"a": {"w": jnp.zeros((8, 4))}, "w": jnp.zeros((4,))}
AXES = {"a": {"w": ("embed", "mlp")}, "w": ("norm",)}


@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.adafactor(1e-3), optax.lion(1e-3)])
def test_moments_lie_where_their_parameters_lie(optimizer):
    state = jax.eval_shape(lambda p: {"params": p, "opt": optimizer.init(p)}, PARAMS)
    placed = state_shardings(state, PARAMS, AXES, layout())
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        sharding = placed
        for key in path:
            sharding = (
                sharding[getattr(key, "key", getattr(key, "idx", None))]
                if hasattr(key, "key") or hasattr(key, "idx")
                else getattr(sharding, key.name)
            )
        assert sharding.spec == (P("fsdp", "tensor") if leaf.shape == (8, 4) else P(*[None] * len(sharding.spec)))


def test_a_large_leaf_that_mirrors_nothing_is_refused():
    with pytest.raises(UserError, match=r"opt/big of shape .* mirrors no parameter"):
        state_shardings({"opt": {"big": jnp.zeros((512, 512))}}, PARAMS, AXES, layout())
