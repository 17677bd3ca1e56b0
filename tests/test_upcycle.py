"""A seed of one expert a modality grows to several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.auxiliary_router import AuxiliaryRouter
from layers.context import Context
from layers.modality_moe import ModalityMoE
from layers.norm import RMSNorm
from maxlike.checkpoint import Checkpoints
from maxlike.errors import UserError
from maxlike.upcycle import Upcycle
from tests.reference.random import random_module

B, T, D = 2, 20, 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
CTX = Context.of(X[..., 0], modality_BT=jnp.asarray(RNG.integers(0, 2, (B, T))), modalities=2)


def layer(seed=0, width=12, **knobs):
    build = functools.partial(ModalityMoE, D, width=width, **knobs)
    graph, params, _ = random_module(lambda rngs: build(rngs=rngs), seed=seed)
    return graph, {"embed": np.full((3, D), seed, np.float32), "lone": np.zeros((1, 2, D), np.float32), "ffn": params}


def run(graph, params):
    return np.asarray(jax.jit(lambda params: nnx.merge(graph, params)(X, CTX)[0])(params["ffn"]))


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """(run directory, the seed's output)"""
    directory = tmp_path_factory.mktemp("seed")
    graph, params = layer(seed=1, groups=(1, 1))
    store = Checkpoints().open(directory / "checkpoints")
    params = jax.tree.map(jnp.asarray, params)
    ema = jax.tree.map(lambda x: x + 1, params)
    store.save(7, {"params": params, "ema": ema, "opt": jnp.ones(3), "step": 7}, {})
    store.close()
    return directory, run(graph, params)


def abstract(params):
    """Shapes and shardings: experts over four devices."""
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))

    def place(path, leaf):
        over = "experts" in jax.tree_util.keystr(path) and leaf.shape[0] == 4
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec("expert" if over else None))
        )

    return jax.tree_util.tree_map_with_path(place, params)


def upcycled(seed, params, **knobs):
    state = {"params": params, "opt": np.zeros(2), "step": 0}
    return Upcycle(source=str(seed[0]), **knobs)(state, {"params": abstract(params)}, [].append)[0]


def test_selected_tokens_get_the_seeds_output_and_the_rest_nothing(seed):
    """The norm behind a Swin block's feed-forward removes the one factor by which the outputs differ."""
    graph, params = layer(seed=2, groups=(4, 4))
    state = upcycled(seed, params)
    assert state["step"] == 0 and state["opt"] is not None
    assert np.all(np.asarray(state["params"]["embed"]) == 1)
    norm = jax.jit(RMSNorm(D, eps=1e-12, rngs=nnx.Rngs(0)).__call__)
    new, old = np.asarray(norm(run(graph, state["params"]))), np.asarray(norm(seed[1]))
    selected = np.abs(new).sum(-1) > 0
    assert 0.4 < selected.mean() < 1.0
    np.testing.assert_allclose(new[selected], old[selected], atol=1e-5)
    for index, group in state["params"]["ffn"]["groups"].items():
        np.testing.assert_array_equal(group["router"], params["ffn"]["groups"][index]["router"])
        gate = group["experts"]["gate"]
        assert gate.sharding.spec[0] == "expert"
        np.testing.assert_array_equal(gate, np.broadcast_to(np.asarray(gate)[:1], gate.shape))


def test_averaged_weights_can_be_the_seed_and_fill_the_average(seed):
    _, params = layer(seed=2, groups=(2, 3))
    state = {"params": params, "ema": params}
    grown, passport = Upcycle(source="not yet", tree="ema").from_run(seed[0])(
        state, {"params": abstract(params)}, [].append
    )
    assert [(stamp["tool"], stamp["step"], stamp["tree"]) for stamp in passport] == [("Upcycle", 7, "ema")]
    assert np.all(np.asarray(grown["params"]["embed"]) == 2)
    jax.tree.map(np.testing.assert_array_equal, grown["params"], grown["ema"])


@pytest.mark.parametrize(
    ("knobs", "fresh", "message"),
    [
        ({"groups": (4, 4), "width": 13}, ("router",), r"do not upcycle(.|\n)*changed +ffn/groups/0/experts/down"),
        ({"groups": (4, 4)}, (), r"do not upcycle(.|\n)*missing +ffn/groups/0/router"),
        ({"groups": (4,)}, ("router",), r"do not upcycle(.|\n)*extra +ffn/groups/1/experts/down \(unused\)"),
        ({"groups": (4, 4)}, ("router", "auxiliary"), r"Upcycle\.fresh names 'auxiliary'"),
        ({"groups": (4, 4), "auxiliary": AuxiliaryRouter}, ("router",), r"missing +ffn/groups/0/auxiliary"),
    ],
)
def test_refusals(seed, knobs, fresh, message):
    _, params = layer(**knobs)
    with pytest.raises(UserError, match=message):
        upcycled(seed, params, fresh=fresh)


def test_only_experts_grow(seed):
    _, params = layer(groups=(4, 4))
    with pytest.raises(UserError, match=r"do not upcycle(.|\n)*changed +lone"):
        upcycled(seed, params | {"lone": np.zeros((4, 2, D), np.float32)})


def test_one_source_for_two_is_refused(seed):
    _, params = layer(groups=(4, 4))
    with pytest.raises(UserError, match="twice"):
        upcycled(seed, params | {"more": params["embed"]}, mapping={"": "", "more": "embed"})
