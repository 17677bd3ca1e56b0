"""A deeper model begins with copies of a trained one's layers, and its passport says so."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.context import Context
from maxlike import config, passport
from maxlike.checkpoint import Checkpoints
from maxlike.deepen import Deepen, best_window, order_of
from maxlike.errors import UserError
from maxlike.evaluate.validation import evaluate
from maxlike.train import train
from maxlike.upcycle import Upcycle
from maxlike.warm_start import WarmStart
from tests import tiny

DEPTH = 4


@functools.cache
def model_of(depth: int):
    return tiny.load(f"stack.Stack.depth = {depth}").abstract_model()


def params_of(depth: int, seed: int = 0):
    """The parameters of a network, all random."""
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.normal, scale=0.3)
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), model_of(depth).params)


def hidden(depth: int, params) -> np.ndarray:
    """The output of the network behind the final norm."""
    model, tokens = model_of(depth), jnp.arange(24).reshape(2, 12)
    run = jax.jit(lambda params: model.merge(params, model.buffers)(tokens, Context.of(tokens)).hidden_BTD)
    return np.asarray(run(params))


def save(directory, params, **metadata):
    store = Checkpoints().open(directory / "checkpoints")
    store.save(9, {"params": params, "opt": jnp.ones(2), "step": 9}, metadata)
    store.close()
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source"), params_of(DEPTH))


def deepened(source, params, tool=Deepen, **knobs):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state, stamps = tool(source=str(source), **knobs)({"params": params, "step": 0}, {"params": abstract}, [].append)
    return state["params"], stamps


def test_windows_are_those_of_the_papers():
    """arXiv 2403.04652: Yi-9B is 0..27, 12..27, 28..31 of 32; arXiv 2312.15166: SOLAR is 0..23, 8..31."""
    assert order_of((12, 28), None, 32, 2) == (*range(28), *range(12, 28), *range(28, 32))
    assert order_of((8, 24), None, 32, 2) == (*range(24), *range(8, 32))
    assert order_of(None, (3, 0, 0), 4, 2) == (3, 0, 0)


def test_a_number_of_layers_takes_those_that_do_least(source):
    """The cosines are an eight-layer model's; its ends are the outliers, as the method assumes."""
    cosines = [0.65, 0.96, 0.97, 0.96, 0.98, 0.96, 0.92, 0.87]
    assert best_window(cosines, 2, 1) == (3, 5) and best_window(cosines, 4, 2) == (2, 6)
    with pytest.raises(UserError, match=r"no 5 layers in a row are in \[2, 6\]"):
        best_window(cosines, 5, 2)
    measured, fresh = source / "measured.json", params_of(5, seed=1)
    with pytest.raises(UserError, match="run `--job measure` on the source first"):
        deepened(source, fresh, window=1, skip=1)
    for step, each, message in ((9, [1.0], "has 1 layers at step 9"), (8, [1.0] * 4, "4 layers at step 8, .* step 9")):
        measured.write_text(json.dumps({"step": step, "values": {"layer_cosine/each": each}}))
        with pytest.raises(UserError, match=message):
            deepened(source, fresh, window=1, skip=1)
    measured.write_text(json.dumps({"step": 9, "values": {"layer_cosine/each": [0.99, 0.9, 0.95, 0.99]}}))
    assert deepened(source, fresh, window=1, skip=1)[1][0]["done"] == {"layers": [0, 1, 2, 2, 3]}


def test_layers_are_exact_copies_and_silent_ones_change_nothing(source):
    old = params_of(DEPTH)
    fresh = params_of(6, seed=1)
    params, stamps = deepened(source, fresh, window=(1, 3), skip=1)
    order = [0, 1, 2, 1, 2, 3]
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, old[np.array(order)]),
        params["stack"]["periods"],
        old["stack"]["periods"],
    )
    np.testing.assert_array_equal(params["embed"]["table"], old["embed"]["table"])
    assert stamps[0]["tool"] == "Deepen" and stamps[0]["done"] == {"layers": order}
    block = params["stack"]["periods"][0]
    for branch, name in (("mixer", "out"), ("ffn", "down")):
        block[branch][name]["kernel"] = block[branch][name]["kernel"].at[jnp.array([3, 4])].set(0)
    np.testing.assert_allclose(hidden(6, params), hidden(DEPTH, old), atol=1e-5)


def test_a_shallower_model_is_a_cut_and_a_vocabulary_too(source):
    old, fresh = params_of(DEPTH), params_of(2, seed=1)
    fresh["embed"]["table"] = fresh["embed"]["table"][:100]
    mapping = {"": "", "stack/periods": "stack/periods[1:3]", "embed/table": "embed/table[:100]"}
    params, stamps = deepened(source, fresh, tool=WarmStart, mapping=mapping)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old[1:3]), params["stack"], old["stack"])
    np.testing.assert_array_equal(params["embed"]["table"], old["embed"]["table"][:100])
    assert stamps[0]["done"] == {"mapping": mapping}


def test_parts_of_one_parameter_may_go_to_several(tmp_path):
    save(tmp_path, {"qkv": jnp.arange(24.0).reshape(2, 12)})
    here = {"q": jnp.zeros((2, 4)), "k": jnp.zeros((2, 4)), "v": jnp.zeros((2, 4))}
    mapping = {"q": "qkv[:, :4]", "k": "qkv[:, 4:8]", "v": "qkv[:,8:]"}
    params, _ = deepened(tmp_path, here, tool=WarmStart, mapping=mapping)
    np.testing.assert_array_equal(np.concatenate([params[name] for name in "qkv"], 1), np.arange(24.0).reshape(2, 12))


@pytest.mark.parametrize(
    ("depth", "tool", "knobs", "message"),
    [
        (5, Deepen, {"window": (1, 3), "skip": 1}, r"makes 6 layers of the 4 in .* Stack.depth asks for 5"),
        (6, Deepen, {"window": (1, 3)}, r"window=\(1, 3\) is not a part of \[2, 2\]"),
        (6, Deepen, {"window": (2, 2), "skip": 1}, "is not a part of"),
        (6, Deepen, {"layers": (0, 1, 2, 3, 4, 5)}, "the source has the layers 0 to 3"),
        (6, Deepen, {}, "give exactly one"),
        (6, Deepen, {"layers": (0,) * 6, "stack": "decoder"}, "Deepen.stack='decoder' is no path of a stack"),
        (6, WarmStart, {}, r"changed +stack/periods/0/ffn/down/kernel"),
        (6, WarmStart, {"mapping": {"": "[0:"}}, "no path with a cut"),
        (4, WarmStart, {"mapping": {"": "", "embed/table": "embed/table[:9999]"}}, "leads out of an array"),
        (4, WarmStart, {"mapping": {"": "", "norm/gain": "norm/gain[:, :]"}}, "cuts 2 dimensions"),
    ],
)
def test_refusals(source, depth, tool, knobs, message):
    with pytest.raises(UserError, match=message):
        deepened(source, params_of(depth), tool=tool, **knobs)


def test_another_width_is_a_table_and_a_pattern_of_several_blocks_needs_its_layers(source, tmp_path):
    narrow = tiny.load("stack.Stack.depth = 6", "mlp.GatedMLP.width = 16").abstract_model().params
    with pytest.raises(UserError, match=r"all but Stack.depth must be the same\n(.|\n)*changed +stack/periods/0/ffn"):
        deepened(source, narrow, window=(1, 3), skip=1)
    periods = {"stack": {"periods": {"0": {"w": jnp.zeros((4, 2))}, "1": {"w": jnp.ones((4, 2))}}}}
    save(tmp_path, periods)
    here = jax.tree.map(lambda x: jnp.zeros((6, 2)), periods)
    with pytest.raises(UserError, match="several blocks, which may differ"):
        deepened(tmp_path, here, window=(1, 3), skip=1)
    params, _ = deepened(tmp_path, here, layers=(0, 1, 2, 1, 2, 3))
    assert np.all(np.asarray(params["stack"]["periods"]["1"]["w"]) == 1)


@pytest.mark.large
def test_the_passport_grows_from_run_to_run_and_is_shown(tmp_path, capsys):
    """A run of two layers -> one of four, trained -> whatever begins from that."""
    first = save(tmp_path / "first", params_of(2), config="steps = 9", code="1.0")
    begins = Deepen(source="not yet", layers=(0, 1, 0, 1)).from_run(first)
    deeper = dataclasses.replace(tiny.load("stack.Stack.depth = 4", "steps = 1"), warm_start=begins)
    second = tmp_path / "second"
    train(deeper, second)
    assert "parameters from" in capsys.readouterr().out
    stamps = deepened(second, params_of(4), tool=WarmStart)[1]
    assert [stamp["tool"] for stamp in stamps] == ["Deepen", "WarmStart"]
    assert [stamp["from"] for stamp in stamps] == [str(first / "checkpoints/9"), str(second / "checkpoints/1")]
    assert stamps[0]["done"] == {"layers": [0, 1, 0, 1]} and (stamps[0]["code"], stamps[0]["step"]) == ("1.0", 9)
    assert stamps[0]["config"] != stamps[1]["config"] and len(stamps[0]["checkpoint"]) == passport.SHOWN
    assert passport.read(first / "checkpoints/9") == [] and passport.read(second / "checkpoints/1") == stamps[:1]
    evaluate(deeper, second)
    line = capsys.readouterr().out.splitlines()[0]
    at = f"{first / 'checkpoints/9'} step 9 (checkpoint {stamps[0]['checkpoint']}, config {stamps[0]['config']})"
    assert line == f"parameters from {at} by Deepen (layers [0, 1, 0, 1])"
    both = passport.line(stamps)
    assert both.index("by WarmStart") < both.index(f"from {first}") and passport.line([]) == ""


def test_it_binds_in_gin():
    loaded = config.load("quickstart", overlays=["deepen"], bindings=["source = 'runs/x'"])
    assert isinstance(loaded.warm_start, Deepen) and loaded.warm_start.from_run("y").window == (2, 4)
    assert Upcycle(source="runs/x").from_run("y").source.name == "y"


def test_routers_keep_the_bias_that_they_were_trained_with(tmp_path):
    bias = jnp.arange(3.0 * DEPTH).reshape(DEPTH, 3)
    store = Checkpoints().open(tmp_path / "checkpoints")
    store.save(9, {"params": params_of(DEPTH), "buffers": _buffers(bias, jnp.ones(2))}, {})
    store.close()
    for depth, tool, order in (
        (DEPTH, WarmStart(source=str(tmp_path)), [0, 1, 2, 3]),
        (6, Deepen(source=str(tmp_path), window=(1, 3), skip=1), [0, 1, 2, 1, 2, 3]),
    ):
        state = {"params": params_of(depth, seed=1), "buffers": _buffers(jnp.zeros((depth, 3)), jnp.zeros(5))}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        said = []
        begun, _ = tool(state, abstract, said.append)
        np.testing.assert_array_equal(begun["buffers"]["stack"]["periods"][0]["router"]["bias"], bias[np.array(order)])
        np.testing.assert_array_equal(begun["buffers"]["amax"], np.zeros(5))
        assert "buffers that begin anew: amax" in said


def _buffers(bias, amax):
    return {"amax": amax, "stack": {"periods": {0: {"router": {"bias": bias}}}}}
