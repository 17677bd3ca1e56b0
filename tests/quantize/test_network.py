"""Quantization of a whole network: bases, the order of calibration, the tool, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.tiny as tiny
from layers import taps
from layers.stack import lay_bare
from maxlike import checkpoint_tree, config
from maxlike.errors import UserError
from maxlike.objectives.batch import context_of
from maxlike.program import Program
from maxlike.quantize import activations, targets
from maxlike.quantize.activations import FakeQuantized, asymmetric
from maxlike.quantize.calibrate import Calibration, in_order
from maxlike.quantize.evaluate import Evaluator
from maxlike.quantize.hadamard import Rotation, hadamard
from maxlike.quantize.measure import QuantizedLoss
from maxlike.quantize.recipe import Recipe
from maxlike.quantize.weights import quantize
from tests.reference import quantize as naive


def logits(experiment, params, buffers, batch, functions):
    """[B, T, V] with open taps."""

    @jax.jit
    def run(params, buffers):
        network = experiment.abstract_model().merge(params, buffers)
        with taps.opened(functions):
            return network.logits(network(batch["inputs"], context_of(batch, None)).hidden_BTD)

    return np.asarray(run(params, buffers))


def unflatten(like, flat):
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in checkpoint_tree.flatten(like)])


def rotated_offline(flat, depth, bits):
    """QuaRot as its paper has it: the residual stream of the parameters really rotated, gains folded away, values and
    output projections by heads, the down projection's input; matrices inside the blocks rounded as they then are."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
    r = np.asarray(Rotation(16, seed=targets.SIGNS)(np.eye(16, dtype=np.float32)), np.float64)
    heads, down = np.kron(np.eye(2), hadamard(8) / np.sqrt(8)), hadamard(32) / np.sqrt(32)
    root, made = "stack/periods/0", {}
    made["embed/table"] = flat["embed/table"] @ r

    def rounded(w):
        return np.stack([naive.symmetric(column, bits)[0] for column in w.T], 1)

    norms = dict.fromkeys(("mixer/query", "mixer/key", "mixer/value"), "mixer_norm")
    norms |= dict.fromkeys(("ffn/gate", "ffn/up"), "ffn_norm") | dict.fromkeys(("mixer/out", "ffn/down"))
    for name, norm in norms.items():
        kernel = flat[f"{root}/{name}/kernel"]
        outputs = 16 if norm is None else kernel[0].size // 16
        layers = []
        for layer in range(depth):
            w = kernel[layer].reshape(-1, outputs)
            w = w @ r if norm is None else r.T @ (flat[f"{root}/{norm}/gain"][layer][:, None] * w)
            w = heads.T @ w if name == "mixer/out" else down.T @ w if name == "ffn/down" else w
            w = w @ heads if name == "mixer/value" else w
            layers.append(rounded(w))
        made[f"{root}/{name}/kernel"] = np.stack(layers).reshape(kernel.shape)
        if norm is not None:
            made[f"{root}/{norm}/gain"] = np.ones((depth, 16))
    return {path: jnp.asarray(made.get(path, leaf), jnp.float32) for path, leaf in flat.items()}


@pytest.mark.large
def test_quarot_is_the_network_whose_parameters_were_rotated(subject):
    experiment, _, state, batch = subject
    batch = {name: jnp.asarray(x[:2]) for name, x in batch.items()}
    recipe = Recipe(weights=6, activations=4, cache=4, method="quarot", search=False)
    weights = quantize(experiment, state["params"], state["buffers"], recipe)
    fake = FakeQuantized(None, recipe)
    ours = {"linear_input": fake.input, "keys": fake.keys, "values": fake.values}
    made = logits(experiment, weights.params, state["buffers"], batch, ours)

    h, down = hadamard(8) / np.sqrt(8), hadamard(32) / np.sqrt(32)
    theirs = {
        "linear_input": lambda x, owner: asymmetric(
            x @ down if owner.inputs == 32 else x, 4, with_zero=owner.input_dims == 1
        ),
        "queries": lambda q, owner: q @ h,
        "keys": lambda k, owner: asymmetric(k @ h, 4, with_zero=True),
        "values": lambda v, owner: asymmetric(v, 4, with_zero=False),
    }
    theirs = {name: functools.partial(_float32, function) for name, function in theirs.items()}
    flat = rotated_offline(checkpoint_tree.flatten(state["params"]), 2, bits=6)
    literal = logits(experiment, unflatten(state["params"], flat), state["buffers"], batch, theirs)
    original = logits(experiment, state["params"], state["buffers"], batch, {})
    apart = np.abs(made - literal)
    # A number on the edge between two values may fall to either side; all others agree.
    assert np.median(apart) < 1e-4 and np.mean(apart > 0.02) < 0.1
    assert np.median(np.abs(made - original)) > 0.02


def _float32(function, x, owner):
    return function(x.astype(jnp.float32), owner).astype(jnp.float32)


def test_rotations_without_rounding_leave_the_logits(subject, monkeypatch):
    experiment, _, state, batch = subject
    recipe = Recipe(weights=16, activations=4, cache=4, method="quarot")
    folded = quantize(experiment, state["params"], state["buffers"], recipe).params
    assert np.all(np.asarray(folded["stack"]["periods"][0]["ffn_norm"]["gain"]) == 1)
    monkeypatch.setattr(activations, "asymmetric", lambda x, bits, with_zero: x)
    fake = FakeQuantized(None, recipe)
    ours = {"linear_input": fake.input, "keys": fake.keys, "values": fake.values}
    batch = {name: jnp.asarray(x[:2]) for name, x in batch.items()}
    made = logits(experiment, folded, state["buffers"], batch, ours)
    np.testing.assert_allclose(made, logits(experiment, state["params"], state["buffers"], batch, {}), atol=1e-4)


def test_calibration_sees_the_inputs_of_each_matrix_behind_what_is_already_replaced(subject):
    experiment, _, state, _ = subject
    found = targets.find(experiment.bare(), Recipe(weights=4, method="gptq"))
    calibration = Calibration.of(experiment, 9)
    assert len(calibration.batches) == 2
    seen = {}

    def keep(path, index, w_IO, hessian_II):
        seen[path, index] = np.asarray(hessian_II)
        return jnp.zeros_like(w_IO) if path.endswith("value/kernel") and index == 1 else w_IO

    said = []
    in_order(experiment, state["params"], state["buffers"], found, calibration, keep, said.append)
    assert len(seen) == len(found.matrices) * 2 and not said
    names = [(path.split("/")[-2], index) for path, index in seen]
    order = [["key", "query", "value"], ["out"], ["gate", "up"], ["down"]]
    at = 0
    for index in range(2):
        for names_of_set in order:
            part = names[at : at + len(names_of_set)]
            assert sorted(part) == [(name, index) for name in names_of_set]
            at += len(names_of_set)
    zeroed = next(hessian for (path, index), hessian in seen.items() if path.endswith("out/kernel") and index == 1)
    assert not np.any(zeroed)  # values are zero by then, so nothing arrives here

    # The first block, whose matrices were left alone, against one pass with taps over the whole network.
    @jax.jit
    def inputs_of_down(batch):
        network = lay_bare(experiment.abstract_model().merge(state["params"], state["buffers"]))
        seen = []
        with taps.opened({"linear_input": lambda x, owner: seen.append((x, owner.inputs)) or x}):
            network(batch["inputs"], context_of(batch, None))
        return next(x for x, inputs in seen if inputs == 32)

    x = np.concatenate([np.asarray(inputs_of_down(batch), np.float64).reshape(-1, 32) for batch in calibration.batches])
    made = next(hessian for (path, index), hessian in seen.items() if path.endswith("down/kernel") and index == 0)
    np.testing.assert_allclose(made, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-4)


def test_gptq_replaces_the_matrices_by_what_its_codes_stand_for_and_nothing_else(subject):
    experiment, _, state, _ = subject
    recipe = Recipe(weights=3, method="gptq", search=False)
    said = []
    made = quantize(
        experiment, state["params"], state["buffers"], recipe, Calibration.of(experiment, 8), say=said.append
    )
    before, after = checkpoint_tree.flatten(state["params"]), checkpoint_tree.flatten(made.params)
    assert len(made.matrices) == 7 and not made.kept and not said
    for matrix in made.matrices:
        assert matrix.damp == 0.01 and matrix.bits == 3 + 16 / matrix.target.inputs
        held = matrix.codes_NIO * matrix.scales_NGO
        np.testing.assert_allclose(held, np.reshape(after[matrix.target.path], held.shape), rtol=1e-5)
        gone = np.reshape(before[matrix.target.path], held.shape) - held
        errors = np.sum(gone**2, (1, 2)) / np.sum(np.reshape(before[matrix.target.path], held.shape) ** 2, (1, 2))
        np.testing.assert_allclose(matrix.errors_N, errors, rtol=1e-3)
    for path in set(before) - {matrix.target.path for matrix in made.matrices}:
        assert np.array_equal(before[path], after[path]), path


def test_the_tool_reports_loss_and_its_rise_scanned_or_not(subject):
    experiment, program, state, _ = subject
    tool = QuantizedLoss(batches=1)
    found = tool(experiment, program, state)
    assert set(found) == {"loss_w4a4kv4", "loss_rise_w4a4kv4"}
    plain = program.evaluate(state, _First(experiment.open_validation()))["loss"]
    assert found["loss_w4a4kv4"] / plain - 1 == pytest.approx(found["loss_rise_w4a4kv4"], abs=1e-5)
    assert abs(found["loss_rise_w4a4kv4"]) > 1e-5
    scanned = tiny.load("stack.Stack.scan = True")
    again = QuantizedLoss(batches=1)(scanned, Program.of(scanned, scanned.mesh.open()), state)
    assert again["loss_w4a4kv4"] == pytest.approx(found["loss_w4a4kv4"], rel=2e-4)
    names = [QuantizedLoss(weights=16, cache=8, method="had").recipe.name, Recipe(activations=16, cache=16).name]
    assert names == ["w16a4kv8_had", "w4a16kv16"]


class _First:
    def __init__(self, batches):
        self.batches = batches

    def iterate(self, host, hosts):
        return iter([self.batches.batch(0)])


def test_more_bits_cost_less(subject):
    experiment, program, state, _ = subject
    evaluator, rises = Evaluator(program, Recipe()), {}
    for bits in (2, 8):
        recipe = Recipe(weights=bits, search=False)
        weights = quantize(experiment, state["params"], state["buffers"], recipe)
        rises[bits] = evaluator(state, weights.params, 2)
    assert abs(rises[8].rise) < 0.02 * abs(rises[2].rise) + 1e-3
    assert rises[2].standard_error > 0 and rises[8].tokens == 2 * 8 * 32


@pytest.mark.parametrize(
    ("name", "bindings", "recipe", "sentence"),
    [
        ("families/moe", [], {"method": "gptq"}, "ffn/experts: each expert meets inputs of its own"),
        ("families/moe", [], {"activations": 4}, "ffn/experts: inputs of experts are not quantized"),
        ("families/mamba_hybrid", [], {"cache": 4}, "periods/2/mixer: MLA caches latents"),
        ("families/linear_attention", [], {"cache": 4}, "mixer: the cache of LightningAttention is not quantized"),
        ("families/mamba_hybrid", [], {"method": "quarot"}, "its mixer is no plain Attention"),
        ("quickstart", [], {"group": 48}, "a group of 48 inputs does not divide the 32 of stack/periods/0/ffn/down"),
        ("quickstart", ["mlp.GatedMLP.width = 26"], {"method": "had"}, "ffn/down: there is no construction"),
        (
            "quickstart",
            ["mlp.GatedMLP.width = 27"],
            {"method": "had", "hadamard_blocks": True},
            "ffn/down: there is no",
        ),
        ("quickstart", ["block.Block.order = 'swin'"], {"method": "quarot"}, "its order is 'swin'"),
        ("image_tokenizer", [], {}, "has no stack of blocks"),
    ],
)
def test_what_a_network_cannot_have_names_the_layer(name, bindings, recipe, sentence):
    load = tiny.load(*bindings) if name == "quickstart" else config.load(name, bindings=bindings)
    with pytest.raises(UserError, match=sentence):
        targets.find(load.bare(), Recipe(**recipe))


def test_blocks_of_a_width_without_a_hadamard_matrix_and_routers_that_stay():
    found = targets.find(tiny.load("mlp.GatedMLP.width = 26").bare(), Recipe(method="had", hadamard_blocks=True))
    assert found.matrices["stack/periods/0/ffn/down/kernel"].enters.block == 2
    hybrid = targets.find(config.load("families/mamba_hybrid").bare(), Recipe())
    assert set(hybrid.kept.values()) == {"one number a head: a rate or a gate"}
    assert all(path.endswith("dt/kernel") for path in hybrid.kept)
    assert not any("conv" in path or "norm" in path for path in hybrid.matrices)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Recipe(weights=5), "Recipe.weights=5"),
        (lambda: Recipe(cache=1), "Recipe.cache=1"),
        (lambda: Recipe(method="awq"), "Recipe.method='awq'"),
        (lambda: Recipe(weights=3, method="nf4"), "which has 4 bits"),
        (lambda: Recipe(method="nf4", levels="asymmetric"), "which has a code book"),
        (lambda: QuantizedLoss(batches=0), "QuantizedLoss.batches=0"),
        (lambda: QuantizedLoss(rows=0), "QuantizedLoss.rows=0"),
        (lambda: Calibration.of(tiny.load(), 0), "is empty"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.meshes
@pytest.mark.parametrize("method", ["rtn", "had", "gptq"])
def test_a_mesh_changes_nothing(method):
    found = []
    for overlays in ((), ("mesh/fsdp_tp",)):
        experiment = tiny.load(overlays=overlays)
        program = Program.of(experiment, experiment.mesh.open())
        found.append(QuantizedLoss(method=method, batches=2, rows=8)(experiment, program, program.init()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
