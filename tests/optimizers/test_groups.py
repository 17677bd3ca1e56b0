import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike.errors import UserError
from maxlike.optimizers import groups
from maxlike.optimizers.adafactor import Adafactor
from maxlike.optimizers.adamw import AdamW
from maxlike.optimizers.lion import Lion
from maxlike.optimizers.muon import Muon
from maxlike.schedules import Clock, Constant

CLOCK = Clock(steps=10, tokens_per_step=10)
ADAMW = AdamW(schedule=Constant(lr=0.1))
EVERY = [
    ADAMW,
    Lion(schedule=Constant(lr=0.1)),
    Adafactor(schedule=Constant(lr=0.1), factor_from=4),
    Muon(schedule=Constant(lr=0.1), others=ADAMW, ns_dtype="float32"),
]


def by_name(optimizer):
    return type(optimizer).__name__


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        (("vocab", "embed"), "embedding"),
        (("embed", "vocab"), "embedding"),
        (("positions", "embed"), "embedding"),
        (("vocab",), "vector"),
        (("layers", "norm"), "vector"),
        (("layers", "heads", "norm"), "vector"),
        (("layers", "heads", "head_dim"), "vector"),
        (("experts", "mlp"), "vector"),
        (("experts",), "vector"),
        (("taps", "embed"), "vector"),
        (("layers", "taps", "groups", "state"), "vector"),
        (("layers", "groups", "state"), "vector"),
        (("layers", "embed", "groups", "state"), "matrix"),
        (("layers",), "vector"),
        ((), "vector"),
        (("embed", "kv_heads", "head_dim"), "matrix"),
        (("layers", "heads", "head_dim", "embed"), "matrix"),
        (("layers", "experts", "embed", "mlp"), "matrix"),
        (("embed", "experts"), "matrix"),
    ],
)
def test_the_axes_say_the_kind(axes, kind):
    assert groups.kind("p", axes) == kind


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (("vocab", "norm"), "embedding and vector"),
        (("embed", "mlp", "state"), "no optimizer group"),
        (("embed", "colour"), "colour"),
    ],
)
def test_a_parameter_of_no_group_or_two_is_refused_by_name(axes, says):
    with pytest.raises(UserError, match=rf"blocks/0/w.*{says}"):
        groups.kinds({"blocks": {0: {"w": axes}}})


@pytest.mark.parametrize(
    ("axes", "shape", "seen"),
    [
        (("embed", "heads", "head_dim"), (8, 2, 3), (8, 6)),
        (("heads", "head_dim", "embed"), (2, 3, 8), (6, 8)),
        (("layers", "experts", "embed", "mlp"), (5, 4, 8, 7), (5, 4, 8, 7)),
        (("layers", "embed", "experts"), (5, 8, 4), (5, 8, 4)),
    ],
)
def test_the_matrix_view(axes, shape, seen):
    assert groups.view(axes).of(jnp.zeros(shape)).shape == seen


def test_select_and_join_are_inverse(axes, tensors):
    labels, tree = groups.kinds(axes), tensors(0, axes)
    parts = [groups.select(tree, labels, kind) for kind in ("matrix", "embedding", "vector")]
    assert parts[1] == {"embed": tree["embed"]}
    jax.tree.map(np.testing.assert_array_equal, groups.join(parts), tree)


@pytest.mark.parametrize("optimizer", EVERY, ids=by_name)
def test_state_in_a_parameters_shape_lies_at_its_path(optimizer, axes, tensors):
    """What sharding relies on: such a leaf's path ends in the parameter's, and init needs no numbers."""
    params = tensors(0, axes)
    flat = {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    state = jax.eval_shape(optimizer(axes, CLOCK).init, params)
    owners = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        owner = next((name for i in range(len(path)) if (name := jax.tree_util.keystr(path[i:])) in flat), None)
        assert owner is not None or leaf.shape == ()
        if owner is not None and leaf.shape == flat[owner]:
            owners.append(owner)
    copies = {"AdamW": 2, "Lion": 1}.get(by_name(optimizer))
    if copies:
        assert sorted(owners) == sorted(list(flat) * copies)
    if isinstance(optimizer, Muon):  # one buffer for a matrix, two for what AdamW has
        kinds = {jax.tree_util.keystr(p): k for p, k in jax.tree_util.tree_flatten_with_path(groups.kinds(axes))[0]}
        assert {name: owners.count(name) for name in flat} == {n: 1 if kinds[n] == "matrix" else 2 for n in flat}


@pytest.mark.parametrize("optimizer", EVERY, ids=by_name)
def test_every_optimizer_descends_a_quadratic(optimizer, few, tensors, run):
    params = tensors(0, few)
    after, _ = run(
        optimizer(few, CLOCK), params, [params] * 3
    )  # the gradient of half the squared norm is the parameter
    for name, new in after.items():
        assert np.sum(np.square(new)) < np.sum(np.square(params[name])), name


@pytest.mark.parametrize("optimizer", EVERY, ids=by_name)
def test_describe_names_every_parameter(optimizer, axes):
    described = optimizer.describe(axes)
    assert len(described) == 11
    assert described["stack/0/norm"].endswith("vector, decay 0, lr x 1")
    assert ("muon" in described["stack/0/out"]) == isinstance(optimizer, Muon)


def test_descend_applies_rate_ratio_and_decay_in_that_order(few, tensors, run):
    rules = {"matrix": groups.Rule(0.5), "embedding": groups.Rule(0.25, 3.0), "vector": groups.Rule(0.0)}
    params, directions = tensors(0, few), tensors(1, few)
    after, state = run(groups.descend(few, rules, lambda count: 0.1 / (1 + count)), params, [directions] * 2)
    for name, kind in groups.kinds(few).items():
        expected = params[name]
        for lr in (0.1, 0.05):
            lr *= rules[kind].lr_ratio
            expected = expected - lr * (directions[name] + rules[kind].decay * expected)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-6)
    assert int(state.count) == 2


@pytest.mark.parametrize(
    ("make", "knob"),
    [
        (lambda s: AdamW(schedule=s, b1=1.0), "AdamW.b1"),
        (lambda s: AdamW(schedule=s, eps=-1.0), "AdamW.eps"),
        (lambda s: AdamW(schedule=s, weight_decay=-0.1), "AdamW.weight_decay"),
        (lambda s: Lion(schedule=s, b2=-0.1), "Lion.b2"),
        (lambda s: Adafactor(schedule=s, decay_rate=0.0), "Adafactor.decay_rate"),
        (lambda s: Adafactor(schedule=s, factor_from=0), "Adafactor.factor_from"),
        (lambda s: Muon(schedule=s, others=ADAMW, ns_steps=0), "Muon.ns_steps"),
        (lambda s: Muon(schedule=s, others=ADAMW, weight_decay=-1.0), "Muon.weight_decay"),
        (lambda s: Muon(schedule=s, others=ADAMW, scale="rms"), "Muon.scale"),
        (lambda s: Muon(schedule=s, others=ADAMW, ns_dtype="float16"), "Muon.ns_dtype"),
        (lambda s: Muon(schedule=s, others=ADAMW, momentum=1.0), "Muon.momentum"),
        (lambda s: Muon(schedule=s, others=ADAMW, stack_shards=0), "Muon.stack_shards"),
    ],
)
def test_refusals_name_the_knob(make, knob):
    with pytest.raises(UserError, match=knob.replace(".", r"\.")):
        make(Constant(lr=0.1))
