"""Training with rows cut along their length is training on one device."""

import jax
import numpy as np
import pytest

from layers import kernels
from maxlike import config
from maxlike.collectives import collectives
from maxlike.errors import UserError
from maxlike.program import Program
from maxlike.row_order import head_tail
from maxlike.sharding import Mesh

SMALL = [
    "vocab = 2048",
    "steps = 5",
    "dim = 16",
    "width = 32",
    "heads = 2",
    "experiment.Experiment.batch_size = 4",
    "experiment.Experiment.sequence_length = 32",
    "experiment.Experiment.optimizer = @adamw.AdamW()",
    "adamw.AdamW.schedule = @others/schedules.WSD()",
    "stack.Stack.scan = True",
]
FAMILIES = {
    "families/transformer": ["depth = 2", "attention.Attention.kv_heads = 2"],
    "families/linear_attention": ["depth = 1", "layers = 2"],
    "families/mamba_hybrid": [
        "depth = 3",
        "mamba2.Mamba2.head_dim = 8",
        "mamba2.Mamba2.state = 8",
        "mla.MLA.kv_rank = 8",
        "mla.MLA.nope_dim = 4",
        "mla.MLA.rope_dim = 4",
        "mla.MLA.value_dim = 4",
    ],
}
CUT = {"fsdp": 2, "context": 4}


def load(name: str, shape: dict[str, int], *bindings: str):
    bindings = (*SMALL, *FAMILIES[name], f"sharding.Mesh.shape = {shape}", *bindings)
    return config.load(name, overlays=["austen", "cpu"], bindings=bindings)


def compiled(experiment):
    program = Program.of(experiment, experiment.mesh.open())
    batches = experiment.data.train(sequence_length=32, batch_size=experiment.batch_size, seed=0)
    kernels.forget()
    return program, batches, program.lower_step(batches.batch(0)).compile()


def trained(experiment):
    """(five losses, the moments after the first step, the parameters after all, the kernels taken, the compiled step,
    the mesh). Adam's moments of one step are the gradients and their squares, times constants."""
    program, batches, step = compiled(experiment)
    taken = {op: name for op, name, _ in kernels.report()}
    state, allow, losses, moments = program.init(), jax.device_put(np.bool_(True), program.layout.replicated), [], None
    for k in range(5):
        state, metrics = step(state, program.put(batches.batch(k)), allow)
        losses.append(float(metrics["loss"]))
        moments = jax.device_get(state["opt"]) if moments is None else moments
    return losses, moments, jax.device_get(state["params"]), taken, step, program.layout.mesh


def close(got, expected):
    """Within 1e-5 of the largest number of each array."""

    def compare(g, e):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5 * np.abs(e).max(initial=0.0))

    jax.tree.map(compare, got, expected)


@pytest.mark.large
@pytest.mark.parametrize("name", FAMILIES)
def test_five_steps_equal_one_device(name):
    losses, moments, params, *_ = trained(load(name, {"data": 1}))
    cut_losses, cut_moments, cut_params, taken, step, mesh = trained(load(name, CUT))
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-5)
    close(cut_moments, moments)
    jax.tree.map(lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-4), cut_params, params)
    assert taken["row_order"] == ("head_tail" if name == "families/transformer" else "in_order")
    sent = [c for c in collectives(step.as_text(), mesh) if c.axes == ("context",) and c.dtype == "f32"]
    rows, length = 4 // 2, 32 // 4
    if name == "families/transformer":  # keys and values of 2 layers go round twice, their gradients once, and home
        part = 2 * rows * length * 2 * 8 * 4
        permutes = [c for c in sent if c.kind == "collective-permute"]
        assert sum(c.bytes * c.times for c in permutes) == 2 * (3 + 3 + 4) * part
    if name == "families/linear_attention":  # states of N K numbers, N = 16 with LRPE and 8, and what is left of one
        states = rows * 2 * ((16 * 8 + 1) + (8 * 8 + 1)) * 4
        gathers = [c for c in sent if c.kind == "all-gather"]
        assert sum(c.bytes * c.times for c in gathers) == 3 * states


def test_head_tail_gives_every_device_as_many_visible_pairs():
    places = head_tail(48, 4).reshape(4, -1)
    assert sorted(places.ravel()) == list(range(48))
    assert len({int(np.sum(part + 1)) for part in places}) == 1  # a query at place p sees p + 1 keys


def test_balance_is_refused_where_it_cannot_be():
    def program(name, *bindings):
        experiment = load(name, {"context": 4}, "sharding.Mesh.balance = True", *bindings)
        return Program.of(experiment, experiment.mesh.open())

    with pytest.raises(UserError, match=r"Mesh.balance = True cannot be: Mamba2 needs rows in order; leave it None"):
        program("families/mamba_hybrid").row_order  # noqa: B018
    with pytest.raises(UserError, match=r"no attention is causal over whole rows"):
        program("families/transformer", "attention.Attention.window = 8").row_order  # noqa: B018
    batch = {"inputs": np.zeros((4, 36), np.int32)}
    with pytest.raises(UserError, match=r"rows of 36 tokens do not divide into 8 pieces; change Experiment.sequence"):
        program("families/transformer").put(batch)


def test_a_mesh_says_how_keys_come():
    experiment = load("families/transformer", {"context": 4}, "sharding.Mesh.keys = 'gather'")
    program = Program.of(experiment, experiment.mesh.open())
    kernels.forget()
    text = program.lower_step(experiment.data.train(sequence_length=32, batch_size=4, seed=0).batch(0)).as_text()
    assert ("context_attention", "gather", "chosen by hand") in kernels.report()
    assert "collective_permute" not in text
    with pytest.raises(UserError, match=r"Mesh.keys='rings' must be 'ring', 'gather' or None"):
        Mesh(shape={"context": 4}, rules={}, keys="rings")


def test_a_network_without_rows_of_tokens_is_refused():
    experiment = config.load("image_tokenizer", overlays=["cpu", "mesh/context"], bindings=["width = 16"])
    with pytest.raises(UserError, match=r"Mesh.shape\['context'\]=8 cuts rows of tokens, and ImageTokenizer has none"):
        Program.of(experiment, experiment.mesh.open()).row_order  # noqa: B018
